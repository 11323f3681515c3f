"""Memory of processes as the kernel counts it, by PSS: a page that n share is a share of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

PERIOD_S = 0.5


def parse_pss(text: str) -> int:
    """Bytes of PSS in a smaps_rollup; 0 of a process that has no memory any more."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "Pss":
            return int(value.split()[0]) * 1024
    return 0


def pss_bytes(pid: int) -> int:
    """Of one process; 0 where it has ended."""
    try:
        return parse_pss(Path(f"/proc/{pid}/smaps_rollup").read_text("ascii"))
    except OSError:
        return 0


def command_name(command_line: bytes) -> str:
    """What a process is, in a word: Ray's title of a worker, or its program's file."""
    first, *rest = command_line.rstrip(b"\0").split(b"\0")
    words = first.decode(errors="replace").split()
    if words and words[0].startswith(("ray::", "qaic_ray", "qaic-ray")):
        return words[0]
    name = Path(words[0]).name if words else "?"
    if not name.startswith("python"):
        return name
    options = [part.decode(errors="replace") for part in rest]
    if "-m" in options[:-1]:
        return f"python -m {options[options.index('-m') + 1]}"
    scripts = [Path(part).name for part in options if part.endswith(".py")]
    return f"python {scripts[0]}" if scripts else name


def marked_processes(variable: str, mark: str) -> dict[int, str]:
    """Names of the processes that live and were started with this variable, by pid."""
    wanted = f"{variable}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = command_name((entry / "cmdline").read_bytes())
    return found


class PeakWatch:
    """Samples the PSS of some processes while the block runs, and keeps the largest sum.

    Args:
        processes: names of those that live now, by pid.
    """

    def __init__(self, processes: Callable[[], dict[int, str]]) -> None:
        self._processes = processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0
        self.at_peak: dict[str, int] = {}
        self.samples = 0

    def __enter__(self) -> PeakWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.take(self.sample())

    def sample(self) -> list[tuple[str, int]]:
        """Name and bytes of each process."""
        return [(name, pss_bytes(pid)) for pid, name in self._processes().items()]

    def take(self, sample: Iterable[tuple[str, int]]) -> None:
        """Keep a sample if it is the largest; processes of one name are added up."""
        by_name: dict[str, int] = {}
        for name, num_bytes in sample:
            by_name[name] = by_name.get(name, 0) + num_bytes
        self.samples += 1
        if (total := sum(by_name.values())) > self.peak_bytes:
            self.peak_bytes, self.at_peak = total, by_name
