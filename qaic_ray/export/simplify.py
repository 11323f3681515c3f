"""Runs onnxsim on the structure of a graph, whose weights stand outside it as inputs.

In a process of its own: the library loads torch, and weights can be written meanwhile.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx

from qaic_ray.errors import ExportError

# The library starts processes of its own, which would outlive this one: all go with whoever waits.
_PROGRAM = """
import os, signal, sys, threading, time

def watch(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=watch, args=(int(sys.argv[3]),), daemon=True).start()
import onnx, onnxsim
model, _ = onnxsim.simplify(onnx.load(sys.argv[1]))
onnx.save(model, sys.argv[2])
"""


class Simplification:
    """onnxsim at work on a model; `result` waits for it.

    Args:
        model: an `onnx.ModelProto` without weights.
        scratch: an empty folder for the files in between.
    """

    def __init__(self, model: Any, scratch: Path) -> None:
        self._model = model
        self._output = scratch / "simplified.onnx"
        source = scratch / "authored.onnx"
        onnx.save(model, source)
        self._log = (scratch / "onnxsim.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(source), str(self._output), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Simplification:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def result(self) -> Any:
        """The simplified model; its interface and its node names are those of the authored one.

        Raises:
            ExportError: onnxsim failed, or changed what it must keep.
        """
        if self._process.wait() != 0 or not self._output.is_file():
            self._log.seek(0)
            last = self._log.read().strip().rpartition("\n")[2]
            raise ExportError(f"onnxsim failed on the exported graph: {last}")
        simplified = onnx.load(self._output)
        _check_kept(self._model, simplified)
        return simplified


def _check_kept(before: Any, after: Any) -> None:
    if list(after.graph.input) != list(before.graph.input):
        raise ExportError("onnxsim changed the inputs of the exported graph.")
    if list(after.graph.output) != list(before.graph.output):
        raise ExportError("onnxsim changed the outputs of the exported graph.")
    kept = {(f.domain, f.name) for f in after.functions}
    if kept != {(f.domain, f.name) for f in before.functions}:
        raise ExportError("onnxsim changed the custom functions of the exported graph.")
