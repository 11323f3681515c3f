"""Times of operators that `qaic-runner` measures: which they are, and whose."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compiled import compile_tiny
from small_nets import compile_net, two_inputs
from tiny_llama import TinyLlama

from qaic_ray.emulator import runner
from qaic_ray.emulator.card import Machine
from qaic_ray.emulator.container.execution import LoadedProgram
from qaic_ray.emulator.qaic import raw_stats
from qaic_ray.emulator.runner.profiling import LatencyLog, share_operators
from qaic_ray.emulator.tools import qaic_opstats


def profiled(qpc: Path, folder: Path, *more: str) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Summaries and traces that `qaic-opstats` makes of some inferences of a program."""
    raw, made = folder / "raw", folder / "made"
    argv = ["-t", str(qpc), "--aic-profiling-type", "raw_device_stats", *more]
    assert runner.main([*argv, "--aic-profiling-out-dir", str(raw)]) == 0
    argv = ["--qpc", str(qpc / "programqpc.bin"), "--input-dir", str(raw)]
    # As public profilers call it.
    argv += ["--summary", "--trace", "--merge-mq-traces", "true", "--flow-events", "full"]
    assert qaic_opstats.main([*argv, "--output-dir", str(made)]) == 0
    summaries = [path.read_text() for path in sorted(made.glob("*.summary.txt"))]
    traces = [json.loads(p.read_text())["traceEvents"] for p in sorted(made.glob("*.trace.json"))]
    return summaries, traces


def test_each_inference_has_the_operators_of_its_model(machine: Machine, tmp_path: Path) -> None:
    model = two_inputs()
    model.graph.node[3].op_type = "Sub"  # onnxruntime would make one node of MatMul and Add
    expected = Counter(node.op_type for node in model.graph.node)
    more = ("-n", "40", "-a", "2", "-S", "3", "--aic-profiling-num-samples", "6")
    more += ("--aic-profiling-start-iter", "4")
    summaries, traces = profiled(compile_net(tmp_path / "net", model), tmp_path, *more)
    assert len(summaries) == len(traces) == 12
    for summary, events in zip(summaries, traces, strict=True):
        operators = [e for e in events if "opKind" in e["args"]]
        assert Counter(e["args"]["opKind"] for e in operators) == expected
        (execute,) = [e for e in events if e["name"] == "Execute"]
        end = execute["ts"] + execute["dur"]
        # In order, one after the other, and within the time that the inference was computed for.
        moments = [(e["ts"], e["ts"] + e["dur"]) for e in operators]
        edges = [execute["ts"], *(edge for pair in moments for edge in pair), end]
        assert all(later - sooner > -2.0 for sooner, later in itertools.pairwise(edges))
        table = summary.split("operators of Execute")[1]
        for kind, number in expected.items():
            (row,) = [line.split() for line in table.splitlines() if line.endswith(f"  {kind}")]
            spent = sum(e["dur"] for e in operators if e["args"]["opKind"] == kind)
            assert (int(row[0]), float(row[1])) == (number, pytest.approx(spent, abs=0.01))


def test_a_compiled_step_has_no_operators_and_that_is_said(tmp_path: Path) -> None:
    program = LoadedProgram(compile_tiny(tmp_path, TinyLlama()), 1, measures_operators=True)
    assert program.step is not None
    assert program.operator_profiles() == []
    whole = {"name": "Execute", "ts": 0.0, "dur": 5.0}
    assert "No operators: the program runs as one compiled" in raw_stats.summary("net", [whole])


def test_random_inputs_fit_a_program_of_several_specializations(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_tiny(tmp_path, TinyLlama())
    assert runner.main(["-t", str(tmp_path / "qpc"), "-n", "2"]) == 0
    assert "InferenceCnt 2 " in capsys.readouterr().out


def flight(number: int, started: float) -> Any:
    times = SimpleNamespace(
        begun=started, prepared=started, enqueued=started, started=started, ended=started + 1,
        woken=started + 1, finished=started + 1, thread=7,
    )  # fmt: skip
    return SimpleNamespace(number=number, in_queue=0, times=times)


def test_runs_are_only_told_where_there_is_one_of_each_inference() -> None:
    def profile(count: int) -> str:
        events: list[dict[str, Any]] = []
        for number in range(count):
            start = 1000 * number
            common = {"tid": 7, "ph": "X"}
            run = {"cat": "Session", "name": "model_run", "ts": start, "dur": 900}
            args = {"op_name": f"Kind{number}"}
            node = {"cat": "Node", "name": "n#3_kernel_time", "ts": start + 5, "dur": 9}
            events += [{**common, **run, "args": {}}, {**common, **node, "args": args}]
        return json.dumps(events)

    for profiles, kinds in (([profile(2)], ["Kind0", "Kind1"]), ([profile(3)], []), ([], []),
                            ([profile(2), profile(2)], [])):  # fmt: skip
        logs = [LatencyLog(0, 9), LatencyLog(0, 9)]
        logs[1].add(flight(0, 20.0))
        logs[0].add(flight(0, 10.0))
        share_operators(logs, profiles)
        events = [event for log in logs for own in log.events(0) for event in own]
        found = [event["args"] for event in events if "opKind" in event["args"]]
        assert [args["opKind"] for args in found] == kinds
        assert {args["opName"] for args in found} <= {"n"}
