"""How the process of an export ended is what its sentence says."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

import pytest

from qaic_ray.api.quiet import LogListener
from qaic_ray.errors import ExportError
from qaic_ray.model.checkpoint import Checkpoint
from qaic_ray.options import ExportOptions, ModelOptions
from qaic_ray.pipeline.export_step import export_step


def end_the_child(how: signal.Signals) -> None:
    """End the first child that this process gets."""
    deadline_s = time.monotonic() + 60
    while not (children := active_children()):
        assert time.monotonic() < deadline_s, "no process came for the export"
        time.sleep(0.01)
    os.kill(children[0].pid or 0, how)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (signal.SIGKILL, "was ended by SIGKILL, most often of a machine that is out of memory: "
                         "try --verify quick, or off."),
        (signal.SIGSEGV, "was ended by SIGSEGV before it was done: give the command again."),
    ],
)  # fmt: skip
def test_a_process_that_is_ended_says_by_what(
    tmp_path: Path, how: signal.Signals, told: str, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    name, out = str(make_checkpoint().folder), tmp_path / "m-kv"
    assert not active_children()
    ending = threading.Thread(target=end_the_child, args=(how,))
    ending.start()
    with pytest.raises(ExportError) as raised:
        export_step(ModelOptions(name=name), ExportOptions(output=str(out)), LogListener())
    ending.join(60)
    assert str(raised.value) == f"The process that exported {name} {told}"
    assert not out.exists()
