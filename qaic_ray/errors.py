"""All errors of this package, in one tree.

    QaicRayError
    ├── UsageError      exit code 2; the message is one sentence with the remedy
    │   ├── JobError, CheckpointError, SpecializationError, SdkNotFound
    │   ├── ParameterError   of the Python interface; a ValueError too
    ├── ExportError, CompileError
    ├── Unfinished, ClusterLost
    ├── FleetClosed, FleetBusy
    ├── RowError        of one prompt
    └── DeviceError     of a card or its runtime, with the vendor's status
        ├── DeviceBusy, DeviceLost

`retryable`: the same work may succeed on another card. `ExitCode` lists all exit codes.
"""

from __future__ import annotations

from enum import IntEnum
from functools import partial


class ExitCode(IntEnum):
    """The exit codes of `qaic-ray`; after a signal it is 128 + the signal's number.

    The last two are EX_SOFTWARE and EX_TEMPFAIL (try again) of sysexits.h.
    """

    DONE = 0
    FAILED = 1
    """Some rows or variants failed, or nothing could be done."""
    USAGE = 2
    """The request itself is wrong."""
    FAULT = 70
    """A fault of qaic-ray's own; the message names the file with the traceback."""
    UNFINISHED = 75
    """Stopped before its end; the message names the command that continues."""


class QaicRayError(Exception):
    """Root of all errors that this package raises on purpose."""

    retryable = False


class UsageError(QaicRayError):
    """The request is wrong; the message says what to do instead."""


class JobError(UsageError):
    """A field of the job tree is missing, unknown or has an impossible value."""


class CheckpointError(UsageError):
    """The model is missing, unsafe or of a kind that we do not run."""


class SpecializationError(UsageError):
    """Static shapes that cannot be compiled together."""


class SdkNotFound(UsageError):
    """No Cloud AI SDK at the place that was asked for."""


class ParameterError(UsageError, ValueError):
    """An argument of the Python interface is wrong; also what programs for vLLM catch."""


class ExportError(QaicRayError):
    """The exported graph could not be made or is not equal to PyTorch's."""


class CompileError(QaicRayError):
    """The SDK's compiler failed; `exit_code` and `log` are its own."""

    def __init__(self, message: str, *, exit_code: int | None = None, log: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.log = log

    def __reduce__(self) -> tuple[object, ...]:
        return partial(CompileError, exit_code=self.exit_code, log=self.log), (str(self),)


class Unfinished(QaicRayError):
    """Stopped before its end, results kept; the message names the command that continues."""


class ClusterLost(QaicRayError):
    """The Ray that the run uses died, or does not answer any more."""


class FleetClosed(QaicRayError):
    """An open fleet has ended, for the reason that the message says; it takes nothing more."""


class FleetBusy(QaicRayError):
    """An open fleet has as many prompts as it may have."""


class RowError(QaicRayError):
    """One prompt cannot be answered; never stops the others."""


class DeviceError(QaicRayError):
    """A card or its runtime refused; `status` is the vendor's `QStatus` name, if there is one."""

    retryable = True

    def __init__(self, message: str, *, status: str | None = None) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), status=self.status), (str(self),)


class DeviceBusy(DeviceError):
    """The card has too few free NSPs, virtual channels or bytes of DRAM for this program."""


class DeviceLost(DeviceError):
    """The card, or the process that held it, is gone."""
