"""When the compiled kernels are there: once a process has chosen enough tokens to be worth it.

numba takes a quarter of a second to import, and seconds to compile what its cache has not yet. So
nobody waits for it: numpy chooses the same tokens meanwhile, a process of few tokens never begins,
and what is not cached is compiled by another process, because a compiler holds the GIL.
`NUMBA_DISABLE_JIT=1` leaves all of it to numpy.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

from qaic_ray.guard import guarded
from qaic_ray.timeouts import DEFAULT_TIMEOUTS

_log = logging.getLogger(__name__)

ENOUGH_TOKENS = 2000
_POLL_S = 0.05


class KernelLoader:
    """Loads the kernels of a process, in a thread of its own.

    Args:
        enough_tokens: chosen by numpy before it begins.
        module: what is imported; it has a class `Compiled` and says whether it `is_compiled`.
    """

    def __init__(
        self, enough_tokens: int = ENOUGH_TOKENS, module: str = "qaic_ray.engine.compiled.chooser"
    ) -> None:
        self._missing = enough_tokens
        self._module = module
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loaded: ModuleType | None = None
        self._is_ending = threading.Event()

    def kernels(self, num_tokens: int) -> ModuleType | None:
        """The kernels, or None where numpy is to choose these tokens."""
        loaded = self._loaded
        if loaded is None and self._thread is None:
            # Threads that count at the same time may lose a token; one of them begins.
            self._missing -= num_tokens
            if self._missing <= 0:
                self._begin()
        return loaded

    def wait(self) -> ModuleType | None:
        """The kernels, loaded now; None where that is not possible."""
        self._begin()
        assert self._thread is not None
        self._thread.join()
        return self._loaded

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                # As a daemon it is no reason for the process to go on; `_end` does not cut it off.
                self._thread = threading.Thread(
                    target=self._load, name="qaic-ray-kernels", daemon=True
                )
                atexit.register(self._end)
                self._thread.start()

    def _end(self) -> None:
        self._is_ending.set()
        if self._thread is not None:
            self._thread.join()

    def _load(self) -> None:
        if not _is_cached():
            _log.info("Compiling the kernels for sampling, once on this machine; numpy serves.")
            self._fill_cache()
        if self._is_ending.is_set():
            return
        try:
            module = importlib.import_module(self._module)
        except (ImportError, OSError) as error:
            _log.warning("Sampling goes on with numpy, which is slower: %s", error)
            return
        if module.IS_COMPILED:
            self._loaded = module
        else:
            _log.info("NUMBA_DISABLE_JIT is set: sampling goes on with numpy.")

    def _fill_cache(self) -> None:
        """Import the kernels in a process that yields to all others, and ends with this one.

        What goes wrong there goes wrong here, too, and is said here.
        """
        code = f"import os, sys; os.nice(19); sys.path[:] = {sys.path!r}; import {self._module}"
        argv = [sys.executable, "-c", code]
        with (
            tempfile.TemporaryFile() as output,
            guarded(argv, output, end_s=DEFAULT_TIMEOUTS.guard_s) as process,
        ):
            while process.poll() is None:
                if self._is_ending.wait(_POLL_S):
                    return


def _is_cached() -> bool:
    """Whether numba's cache beside this file has kernels for this Python."""
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder = Path(__file__).parent / "__pycache__"
    return any(folder.glob(f"kernels.*.{version}*.nbi"))


KERNELS = KernelLoader()
"""Those of this process; an engine per card may share them."""
