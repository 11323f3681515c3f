"""`qaic-runner`: runs a QPC again and again on files or random values, and says how fast that was.

Covered: the options that public programs use, file names, the latency file, the `Stats` block.
Inferred: which columns the latency file has and their order, the tolerance of `-c`, the range of
bounded random values, the status of an unknown option (1). Not covered: cycles and cores of a
device (`stats` and `raw_device_stats` hold host times, of operators too) and live reporting.
"""

from __future__ import annotations

import sys
from typing import List, Optional, Sequence, Set

from ..card import READY, Machine
from ..card.faults import FaultFileError
from ..folder import FolderError
from ..qaic.hosting import Flight, HostedProgram, Hosting
from ..qaic.streaming import stream
from .argv import DEFAULT_NUM_ITERATIONS, HelpAsked, RunnerError, RunnerOptions, parse, usage
from .batches import Source, open_source
from .profiling import (
    LatencyLog,
    performance_lines,
    share_operators,
    write_latencies,
    write_statistics,
    write_traces,
)
from .results import Validation, write_outputs

PROGRAM = "qaic-runner"

_INTERRUPTED = 130
_WITH_OPERATORS = frozenset(["stats", "raw_device_stats", "trace"])


def main(argv: Sequence[str], program: str = PROGRAM) -> int:
    """Run the tool on its arguments, the program's name not included.

    Returns:
        0, or 1 where anything failed, or 130 after Ctrl+C.
    """
    try:
        options = parse(argv)
    except HelpAsked:
        print(usage(program), end="")
        return 0
    except RunnerError as error:
        print(f"{program}: {error}\nFailed to validate arguments", file=sys.stderr)
        print(usage(program), end="")
        return 1
    for name in options.without_effect:
        print(f"Option {name} is accepted and has no effect on this emulated SDK.", file=sys.stderr)
    try:
        _check_devices(options)
        host = _open(options)
    except (RunnerError, RuntimeError, FolderError, FaultFileError) as error:
        print(f"{error}\nFailed to initialize QAIC runner", file=sys.stderr)
        return 1
    try:
        return RunLoop(host, options).run()
    except (RunnerError, RuntimeError, ValueError) as error:
        print(f"{error}\nFailed to run QAIC runner", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        host.close()


def _check_devices(options: RunnerOptions) -> None:
    cards = {card.qid: card for card in Machine.here().cards()}
    for qid in options.qids:
        if qid not in cards:
            raise RunnerError(f"Invalid device:{qid}")
        if cards[qid].status != READY:
            raise RunnerError(f"Device:{qid} not in ready state")


def _open(options: RunnerOptions) -> HostedProgram:
    if options.verbosity:
        shown = ":".join(map(str, options.qids)) or "auto-pick"
        print(f"Device: ID {shown}\nTest path: {options.qpc}")
    for path in options.input_files:
        print(f"Input file: {path}")
    return HostedProgram(
        options.qpc,
        Hosting(
            qids=options.qids,
            num_activations=options.num_activations,
            set_size=options.set_size,
            num_threads=options.num_threads,
            measures_operators=not _WITH_OPERATORS.isdisjoint(options.profiling_types),
        ),
    )


class RunLoop:
    """One run: inferences begun while it goes on, and what is done with each that ended."""

    def __init__(self, host: HostedProgram, options: RunnerOptions) -> None:
        self._host = host
        self._options = options
        self._source: Source = open_source(host, options)
        self._validation = Validation(host.outputs, [_bytes(path) for path in options.output_files])
        start, count = options.profiling_start, options.num_profiled
        self._logs = [LatencyLog(start, count) for _ in range(options.num_activations)]
        first = options.output_start
        self._written = range(first, first + options.num_outputs) if options.writes_outputs else ()
        self._number = 0

    def run(self) -> int:
        """Run it, write the files and print the figures; 1 where an output is not as expected."""
        options = self._options
        if self._source.is_random:
            kind = "unbounded" if options.unbound_random else "bounded"
            print(f"Using {kind} random inputs", flush=True)
        count, seconds = stream(
            self._host, self._begin, goes_on=self._goes_on, finished=self._finished
        )
        share_operators(self._logs, self._host.operator_profiles())
        self._write_profiles()
        batch_size = self._host.qpc.getInfo().batchSize
        print(" ---- Stats ----")
        print(
            f"InferenceCnt {count} TotalDuration {round(seconds * 1e6)}us BatchSize {batch_size} "
            f"Inf/Sec {count * batch_size / seconds:.3f}"
        )
        if "raw_device_stats" in options.profiling_types:
            print("\n".join(performance_lines(self._logs)))
        if "trace" in options.profiling_types:
            write_traces(options.profiling_dir, self._logs)
        if self._validation.num_failed:
            print("Output validation failed", file=sys.stderr)
            return 1
        if options.verbosity:
            print("Inference run completed successfully!")
            if self._validation.num_passed:
                print("Output validation successful!")
        return 0

    def _write_profiles(self) -> None:
        folder, kinds = self._options.profiling_dir, self._options.profiling_types
        name = self._host.qpc.contents.name
        for kind, raw in (("raw_device_stats", True), ("stats", False)):
            if kind in kinds:
                write_statistics(folder, self._logs, name, raw=raw)
        if "latency" in kinds:
            write_latencies(folder, self._logs, name, self._options.set_size)

    def _goes_on(self, count: int, seconds: float) -> bool:
        options = self._options
        if options.seconds is not None:
            return seconds < options.seconds
        if options.num_iterations is not None:
            return count < options.num_iterations
        is_batch = not self._source.is_random and not options.input_files
        return count < (self._source.count if is_batch else DEFAULT_NUM_ITERATIONS)

    def _begin(self, index: int) -> Flight:
        batch = self._source.batch(index)
        return self._host.begin(batch.inputs, self._wanted(set(batch.inputs), set(batch.expected)))

    def _wanted(self, given: Set[str], expected: Set[str]) -> Optional[List[str]]:
        """Outputs to fetch: all, but of the states that stay on the device only those asked for."""
        host = self._host
        if len(given) == len(host.inputs) or (self._source.is_random and self._written):
            return None
        asked = expected | self._source.outputs | set(self._validation.names)
        return [b.name for b in host.outputs if b.name not in host.states or b.name in asked]

    def _finished(self, index: int, flight: Flight) -> None:
        outputs = flight.finish()
        if flight.number in self._written:
            write_outputs(self._options.output_dir, outputs, flight.instance, flight.number)
        if self._options.profiling_types:
            self._logs[flight.instance].add(flight)
        expected = self._source.batch(index).expected
        if expected or self._validation.names:
            self._validation.check(outputs, expected, index)


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunnerError(f"Failed to open file: {path}: {reason}") from error
