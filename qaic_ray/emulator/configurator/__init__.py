"""`model_configurator.py`: compiles and runs a model in many ways, and says which is best.

Covered: optimized search by a configuration file in both public forms, and the grid of values on
the command line; each point is compiled by `qaic-exec` and measured by `qaic-runner`. Inferred: how
the optimizer moves, values on the command line between commas, `results.csv`. Not covered: several
models at once, single-device partitions, files of configurations as CSV, TensorFlow models.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import datetime
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Tuple

from ..card import Machine, NoDevice
from ..compiler.argv import FLAGS
from ..container import FILE_NAME
from ..folder import FolderError, current
from .search import NAMES, ConfigurationError, Found, Point, Space, climb, read_search

PLACE = "scripts/qaic-model-configurator/model_configurator.py"
"""Where it lies in the SDK."""

OUTPUT = "model_configurator_output"
DEFAULT_SET_SIZE = 10

_STATS = re.compile(r"Inf/Sec ([0-9.]+)")
_LATENCY = "totalRoundtripTimeUs"


class Job(NamedTuple):
    """What is searched, from the command line and the configuration file."""

    model: Path
    folder: Path
    space: Space
    starts: Tuple[Point, ...]
    grid: Tuple[Point, ...]
    for_latency: bool
    most: int
    shows_set_size: bool
    flags: Tuple[str, ...]
    batch_symbol: str
    run: Tuple[str, ...]
    qid: int
    num_parallel: int
    compile_only: bool


class Measured(NamedTuple):
    """What a run of a point gave: inputs a second and the mean time of an inference."""

    rate: float
    latency_us: float


def main(argv: Sequence[str]) -> int:
    """Run the tool; 2 for a refused command line, 1 where no point could be measured."""
    begun = time.perf_counter()
    try:
        job = plan(argv)
    except (ConfigurationError, FolderError) as error:
        print(f"model_configurator.py: error: {error}", file=sys.stderr)
        return 2
    _log(f"Starting {current().root / PLACE} {' '.join(argv)}")
    _log(f"Model Name: {job.model.name}")
    threads = os.cpu_count()
    _log(f"Hostname: {platform.node()}, Logical Cores: {threads}, Memory: {_memory_gb():.1f} GB")
    bench = Bench(job)
    if job.grid:
        _log("Running brute force search")
        costs = bench.evaluate(list(job.grid))
        best = min(costs.values(), default=math.inf)
        order = sorted(costs, key=costs.__getitem__)
        _log("Brute force search results:")
        print("\n".join(_table(job, [Found(p, p, costs[p], "") for p in order])))
    else:
        _log("Running optimized search")
        _log(f"Running optimization algorithm from initial values: {bench.shown(job.starts)}")
        found = climb(job.starts, job.space, bench.evaluate, job.most)
        best = min(one.cost for one in found)
        _log("Optimized search results:")
        print("\n".join(_table(job, found)))
    bench.write_results()
    seconds = time.perf_counter() - begun
    minutes, rest = divmod(seconds, 60)
    _log(f"Total execution time {int(minutes) // 60:02d}:{int(minutes) % 60:02d}:{rest:06.3f}")
    return 0 if best < math.inf or job.compile_only else 1


class Bench:
    """Compiles points and measures them on a card; a program is compiled once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._root = current().root
        self._programs: Dict[Point, Optional[Path]] = {}
        self.measured: Dict[Point, Measured] = {}

    def evaluate(self, points: List[Point]) -> Mapping[Point, float]:
        """The cost of each point: minus the inputs a second, or microseconds; infinite for none."""
        job = self._job
        _log(f"Evaluating the following SearchPoints: {self.shown(points)}")
        wanted = dict.fromkeys(point[:4] for point in points)
        fresh = [program for program in wanted if program not in self._programs]
        with concurrent.futures.ThreadPoolExecutor(job.num_parallel) as pool:
            self._programs.update(zip(fresh, pool.map(self._compile, fresh)))
        if job.compile_only:
            return dict.fromkeys(points, math.inf)
        return {point: self._cost(point) for point in points}

    def shown(self, points: Sequence[Point]) -> str:
        """Points as the vendor's log shows them."""
        return "[" + ", ".join(_point(self._job, point) for point in points) + "]"

    def _compile(self, program: Point) -> Optional[Path]:
        cores, mos, ols, batch_size = program
        name = f"qpc-cores-{cores}-mos-{mos}-ols-{ols}-bs-{batch_size}-output"
        target = self._job.folder / name
        _log(f"Compiling model: compilerParams={_named(program)}")
        if (target / FILE_NAME).exists():
            shutil.rmtree(target)
        symbol = self._job.batch_symbol
        batch = (
            f"-onnx-define-symbol={symbol},{batch_size}" if symbol else f"-batchsize={batch_size}"
        )
        done = self._tool(
            "qaic-exec", f"-m={self._job.model}", "-aic-hw", "-aic-hw-version=2.0", "-compile-only",
            f"-aic-num-cores={cores}", f"-mos={mos}", f"-ols={ols}", batch,
            f"-stats-batchsize={batch_size}", f"-aic-binary-dir={target}", *self._job.flags,
        )  # fmt: skip
        if done.returncode:
            _log(f"Failed to compile {name}: {_last(done.stderr)}", "ERROR")
            return None
        return target

    def _cost(self, point: Point) -> float:
        path = self._programs[point[:4]]
        if path is None:
            return math.inf
        instances, set_size = point[4:]
        runs = f"instances={instances}"
        if self._job.shows_set_size:
            runs += f", setSize={set_size}"
        _log(
            f"Running the following set of models on device ID {self._job.qid}: "
            f'{{"{self._job.model.stem}": (compiledModelPath={path}, runnerParams={runs})}}'
        )
        with tempfile.TemporaryDirectory() as folder:
            done = self._tool(
                "qaic-runner", "-t", str(path), "-d", str(self._job.qid), "-a", str(instances),
                "-S", str(set_size), *self._job.run, "--aic-profiling-type", "latency",
                "--aic-profiling-num-samples", "99999", "--aic-profiling-out-dir", folder,
            )  # fmt: skip
            rate = _STATS.search(done.stdout)
            if done.returncode or rate is None:
                _log(f"Failed to run {path.name} with {runs}: {_last(done.stderr)}", "ERROR")
                return math.inf
            found = Measured(float(rate.group(1)), _mean_latency(Path(folder)))
        self.measured[point] = found
        return found.latency_us if self._job.for_latency else -found.rate

    def _tool(self, name: str, *arguments: str) -> Any:
        command = [str(self._root / "exec" / name), *arguments]
        # Its output is ours to show, and no terminal of ours is its input.
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    def write_results(self) -> None:
        """Write every measured point to `results.csv`."""
        with open(Path(OUTPUT, "results.csv"), "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*NAMES, "inf/sec", "latency (micro-sec)"])
            for point, found in sorted(self.measured.items()):
                writer.writerow([*point, f"{found.rate:.3f}", f"{found.latency_us:.3f}"])


def plan(argv: Sequence[str]) -> Job:
    """Read the command line and the configuration file that it names.

    Raises:
        ConfigurationError: where one of them is refused.
    """
    asked, flags = _parse(argv)
    name = asked.model or asked.path
    if not name:
        raise ConfigurationError("no model is given: name an ONNX file with -model")
    model = Path(name)
    if not model.is_file():
        raise ConfigurationError(f"Failed to open file: {name}; name an ONNX file with -model")
    try:
        num_cores = Machine.here().card(asked.device_id).total.num_nsps
    except NoDevice as error:
        raise ConfigurationError(f"Invalid device:{asked.device_id}") from error
    size = asked.set_size or DEFAULT_SET_SIZE
    file = asked.config or asked.optimized
    if file:
        bounds, starts, for_latency, most = read_search(file, size)
    else:
        values = [asked.cores, asked.mos, asked.ols, asked.batch_size]
        lists = [_numbers(text) for text in values] + [_numbers(asked.instances or "0"), [size]]
        if asked.instances is None:
            lists[4] = list(range(1, num_cores + 1))
        bounds = [(min(numbers), max(numbers)) for numbers in lists]
        starts, for_latency, most = [], False, 0
    space = Space(tuple(bounds), num_cores)
    grid = [] if file else space.grid(lists)
    if asked.instances is None and grid:
        grid = [p for p in grid if p[4] == num_cores // p[0]]
    beyond = [point for point in starts if not space.holds(point)]
    if beyond:
        raise ConfigurationError(
            f"{file}: initial value {_named(beyond[0])} is not within the bounds, or takes more "
            f"than the {num_cores} cores of device {asked.device_id}"
        )
    if not starts and not grid:
        raise ConfigurationError(f"no configuration fits the {num_cores} cores of the device")
    part = () if asked.path else (model.stem,)
    folder = Path(OUTPUT, "compiled_models", *part)
    folder.mkdir(parents=True, exist_ok=True)
    runs = ["--time", str(asked.time)] if asked.iter is None else ["-n", str(asked.iter)]
    if asked.input_list_file:
        runs += ["--aic-batch-input-file-list", asked.input_list_file]
    return Job(
        model, folder, space, tuple(starts), tuple(grid), for_latency, most,
        bounds[5][0] < bounds[5][1], tuple(flags), asked.symbol or "", tuple(runs),
        asked.device_id, min(asked.parallel, os.cpu_count() or 1), asked.compile_only,
    )  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage of twenty options before it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; -h lists the options")


def _parse(argv: Sequence[str]) -> Tuple[argparse.Namespace, List[str]]:
    """What is this tool's, and the options that are the compiler's."""
    parser = _Parser(prog="model_configurator.py", allow_abbrev=False)
    parser.add_argument("path", nargs="?", help="the model, before Apps 1.20")
    parser.add_argument("framework", nargs="?", choices=("onnx",), default="onnx")
    parser.add_argument("-model", help="the ONNX file")
    parser.add_argument("-config", help="JSON of a search")
    parser.add_argument("-optimized-config-search", dest="optimized", help="the same, older")
    for name in ("cores", "mos", "ols"):
        parser.add_argument(f"-{name}", default="1", help="values between commas, without a JSON")
    parser.add_argument("-batchsize", dest="batch_size", default="1")
    parser.add_argument("-instances", help="values between commas; as many as fit by default")
    parser.add_argument("-set-size", "-search-set-size", dest="set_size", type=_count)
    parser.add_argument("-onnx-define-symbol-batch-size", dest="symbol", help="the batch dimension")
    parser.add_argument("-time", type=_count, default=10, help="seconds of each run, default 10")
    parser.add_argument("-iter", type=_count, help="inferences of each run in place of seconds")
    parser.add_argument("-device-id", type=int, default=0)
    parser.add_argument("-input-list-file", help="inputs of the runs; random without it")
    parser.add_argument("-compile-only", action="store_true")
    parser.add_argument(
        "-max-parallel-compilations", "-max-compilation-threads",
        dest="parallel", type=_count, default=1,
    )  # fmt: skip
    asked, rest = parser.parse_known_args(list(argv))
    flags: List[str] = []
    for word in rest:
        if not word.startswith("-") and flags and "=" not in flags[-1]:
            flags[-1] += f"={word}"
        elif word.partition("=")[0] in FLAGS:
            flags.append(word)
        else:
            parser.error(f"unrecognized arguments: {word}")
    return asked, flags


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a positive number")
    return int(text)


def _numbers(text: str) -> List[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigurationError(f"'{text[:80]}' must be numbers between commas") from error


def _mean_latency(folder: Path) -> float:
    """Mean time of an inference in the latency files of a run, in microseconds."""
    times: List[float] = []
    for path in folder.glob("*-latency.txt"):
        rows = csv.reader(path.read_text("utf-8").splitlines()[4:], skipinitialspace=True)
        place = next(rows).index(_LATENCY)
        times.extend(float(row[place]) for row in rows)
    return sum(times) / len(times) if times else math.inf


def _table(job: Job, found: Sequence[Found]) -> List[str]:
    unit = "micro-sec" if job.for_latency else "inf/sec"
    names = NAMES if job.shows_set_size else NAMES[:5]
    head = ["", "OptimizerStatus", "InitialValue", *names, f"Objective ({unit})"]
    rows = [head]
    for index, one in enumerate(found):
        cost = "N/A" if math.isinf(one.cost) else f"{abs(one.cost):.2f}"
        values = [f"[{x}]" if name == "mos" else str(x) for name, x in zip(names, one.best)]
        rows.append([str(index), one.status, _point(job, one.start), *values, cost])
    if job.grid:
        rows = [[row[0], *row[3:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _point(job: Job, point: Point) -> str:
    return _named(point if job.shows_set_size else point[:5])


def _named(point: Point) -> str:
    shows = (f"{n}=[{x}]" if n == "mos" else f"{n}={x}" for n, x in zip(NAMES, point))
    return f"({', '.join(shows)})"


def _log(text: str, level: str = "INFO") -> None:
    now = datetime.datetime.now()
    print(f"{now:%Y-%m-%d %H:%M:%S}.{now.microsecond // 1000:03d} - [{level}]: {text}", flush=True)


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
