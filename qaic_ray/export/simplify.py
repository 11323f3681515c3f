"""onnxsim on the structure of a graph, whose weights stand outside it as inputs.

It runs in a process of its own: the library loads torch, and weights can be written meanwhile.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import onnx

from qaic_ray.errors import ExportError

Simplifier = Callable[
    [onnx.ModelProto, Path], AbstractContextManager[Callable[[], onnx.ModelProto]]
]
"""Starts on a model, with an empty folder for its files; the function that it gives waits for the
result. `simplifying` is the real one."""

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


@contextmanager
def simplifying(model: onnx.ModelProto, scratch: Path) -> Iterator[Callable[[], onnx.ModelProto]]:
    """Start onnxsim on a model without weights; all of it is ended with the block.

    Yields:
        A function that waits for the simplified model, whose interface and node names are those
        of `model`. It raises ExportError where onnxsim failed or changed what it must keep.
    """
    source, output = scratch / "authored.onnx", scratch / "simplified.onnx"
    onnx.save(model, source)
    with (scratch / "onnxsim.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(source), str(output), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        def result() -> onnx.ModelProto:
            if process.wait() != 0 or not output.is_file():
                log.seek(0)
                last = log.read().strip().rpartition("\n")[2]
                raise ExportError(f"onnxsim failed on the exported graph: {last}")
            simplified = onnx.load(output)
            _check_kept(model, simplified)
            return simplified

        try:
            yield result
        finally:
            with suppress(ProcessLookupError):  # all of it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _check_kept(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Inputs, outputs and custom functions stay as they were."""
    for what, old, new in (
        ("inputs", list(before.graph.input), list(after.graph.input)),
        ("outputs", list(before.graph.output), list(after.graph.output)),
        ("custom functions", _functions(before), _functions(after)),
    ):
        if old != new:
            raise ExportError(f"onnxsim changed the {what} of the exported graph.")


def _functions(model: onnx.ModelProto) -> set[tuple[str, str]]:
    return {(function.domain, function.name) for function in model.functions}
