"""What `qaic-runner` does with outputs: files in the vendor's names, and comparisons."""

from __future__ import annotations

import os
import sys
from typing import Dict, List, Mapping, Sequence

import numpy as np

from ..container.netdesc import Binding
from .argv import RunnerError

CYCLE_COUNTS = "aiccyclecounts"
"""An output of profiled programs, which no comparison looks at."""

TOLERANCE = 1e-2
"""Of floats that are compared, relative and absolute; inferred: the vendor's is not public."""


def write_file(folder: str, name: str, data: bytes) -> None:
    """Write a file, saying so as the vendor's tools do.

    Raises:
        RunnerError: where it cannot be written.
    """
    path = os.path.join(folder, name)
    try:
        if os.path.exists(path):
            print(f"Deleting previous file: {path}")
            os.remove(path)
        print(f"Writing file:{path}")
        with open(path, "xb") as file:
            file.write(data)
    except OSError as error:
        raise RunnerError(f"Failed to write file: {path}: {error.strerror}") from error


def write_outputs(
    folder: str, outputs: Mapping[str, np.ndarray], activation: int, number: int
) -> None:
    """Write each output as `NAME-activation-A-inf-I.bin`."""
    for name, array in outputs.items():
        # A name of a graph may have slashes; the file stays in the folder.
        file_name = f"{name.replace(os.sep, '_')}-activation-{activation}-inf-{number}.bin"
        write_file(folder, file_name, array.tobytes())


class Validation:
    """Compares the outputs of inferences; `num_failed` counts those that differ.

    `files` are expected bytes, one an output in the program's order. What a batch expects is equal
    within a tolerance where it is floats.
    """

    def __init__(self, outputs: Sequence[Binding], files: Sequence[bytes]) -> None:
        compared = [b.name for b in outputs if b.name != CYCLE_COUNTS]
        if files and len(files) != len(compared):
            raise RunnerError(
                f"Number of output files ({len(files)}) is not that of the outputs "
                f"({len(compared)}): {', '.join(compared)}"
            )
        self._exact: Dict[str, bytes] = dict(zip(compared, files))
        self.num_failed = 0
        self.num_passed = 0

    @property
    def names(self) -> List[str]:
        """Outputs that every inference is compared in."""
        return list(self._exact)

    def check(
        self, outputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], iteration: int
    ) -> None:
        """Compare one inference's outputs with the files and with what its batch expects."""
        verdicts = {name: outputs[name].tobytes() == data for name, data in self._exact.items()}
        verdicts.update({name: _is_near(outputs[name], array) for name, array in expected.items()})
        failed = [name for name, is_right in verdicts.items() if not is_right]
        self.num_passed += len(verdicts) - len(failed)
        self.num_failed += len(failed)
        if failed:
            print(
                f"Validation Failed for iteration {iteration}, num failed: {len(failed)}, "
                f"num passed: {len(verdicts) - len(failed)} ({', '.join(failed)})",
                file=sys.stderr,
            )


def _is_near(found: np.ndarray, expected: np.ndarray) -> bool:
    found = found.reshape(-1)
    if found.size != expected.size:
        return False
    if found.dtype.kind != "f":
        return bool(np.array_equal(found, expected))
    return bool(np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))
