"""Emulated cards share the cores of a machine by the work that they have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from awaited import ended
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.emulator.card.cores import Cores

OTHER = """
import sys, time
from pathlib import Path
from qaic_ray.emulator.card.cores import Cores
with Cores(Path(sys.argv[1]), 8).share(8) as threads:
    print(threads, flush=True)
    sys.stdin.readline()
"""


def other_process(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OTHER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@given(num_cores=st.integers(1, 64), computing=st.integers(1, 9), most=st.integers(1, 64))
def test_the_share_is_an_even_one(num_cores: int, computing: int, most: int) -> None:
    cores = Cores(None, num_cores)
    with ExitStack() as running:
        shares = [running.enter_context(cores.share(most)) for _ in range(computing)]
    assert shares == [max(1, min(most, num_cores // (i + 1))) for i in range(computing)]
    with cores.share(most) as alone:
        assert alone == min(most, num_cores)


def test_processes_count_each_other_and_not_the_dead(tmp_path: Path) -> None:
    mine = Cores(tmp_path, 8)
    with mine.share(8) as alone:
        assert alone == 8
    with other_process(tmp_path) as one:
        assert one.stdout is not None
        assert one.stdin is not None
        assert one.stdout.readline() == "8\n"
        with mine.share(8) as beside_one:
            assert beside_one == 4
            with other_process(tmp_path) as two:
                assert two.stdout is not None
                assert two.stdout.readline() == "2\n"
                os.kill(two.pid, signal.SIGKILL)
                ended(two)
            with mine.share(8) as beside_a_dead_one:
                assert beside_a_dead_one == 8 // 3
        one.stdin.write("\n")
        one.stdin.flush()
        ended(one)
    with mine.share(8) as alone:
        assert alone == 8


def test_a_board_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cores").mkdir()
    with Cores(tmp_path, 4).share(4) as threads:
        assert threads == 4
