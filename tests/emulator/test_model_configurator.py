"""`model_configurator.py` as the two tutorials call it, and its search alone."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_nets import two_inputs

from qaic_ray.emulator import configurator
from qaic_ray.emulator.card import Machine
from qaic_ray.emulator.configurator import search
from qaic_ray.emulator.configurator.search import GAIN, Point, Space, climb

BOUNDS = {"cores": (7, 8), "batch-size": (1, 2), "instances": (1, 2)}
SYMBOLS = ["-onnx-define-symbol-batch-size=batch", "-onnx-define-symbol=length,5"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model in it."""
    onnx.save(two_inputs(), tmp_path / "net.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_search(place: Path, **changes: Any) -> str:
    """A search of few points in the form of the tutorial of 2025."""
    bounds = {name: {"min": low, "max": high} for name, (low, high) in BOUNDS.items()}
    first = {"cores": 8, "batch-size": 1, "instances": 1}
    content = {
        "search-mode": "optimized",
        "objective": "max-throughput",
        "search-parameters": bounds,
        "initial-values": [first, {**first, "cores": 7}],
        "max_func_eval": 4,
        **changes,
    }
    path = place / "search.json"
    path.write_text(json.dumps(content))
    return str(path)


def results(place: Path) -> list[dict[str, str]]:
    with open(place / "model_configurator_output/results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_tutorial_of_2025(
    machine: Machine, place: Path, sdk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = sdk / "scripts/qaic-model-configurator/model_configurator.py"
    argv = [sys.executable, str(script), "-model", "net.onnx", *SYMBOLS, "-multicast-weights"]
    argv += [f"-config={write_search(place)}", "-max-parallel-compilations=16", "-iter=8"]
    done = subprocess.run(
        [*argv, "-convert-to-fp16", "-device-id=1", "-search-set-size", "2"],
        env=dict(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}} - \[INFO\]: Starting {script} -model .*",
        lines[0],
    )
    head, first, second, total = lines[-4:]
    assert re.sub(r" +", " ", head).strip() == (
        "OptimizerStatus InitialValue cores mos ols batchSize instances Objective (inf/sec)"
    )
    assert "(cores=8, mos=[1], ols=1, batchSize=1, instances=1)" in first
    assert "(cores=7, mos=[1], ols=1, batchSize=1, instances=1)" in second
    assert re.search(r"- \[INFO\]: Total execution time 00:\d\d:\d\d\.\d{3}$", total)
    # Each program was compiled for what its name says, and its figure is the best of the file.
    compiled = place / "model_configurator_output/compiled_models/net"
    report = json.loads(
        (compiled / "qpc-cores-7-mos-1-ols-1-bs-2-output/compile-report.json").read_text()
    )
    assert (report["num_cores"], report["convert_to_fp16"]) == (7, True)
    assert report["specializations"] == [{"length": 5, "batch": 2}]
    measured = {(r["cores"], r["batchSize"], r["instances"]): r["inf/sec"] for r in results(place)}
    assert all(r["setSize"] == "2" for r in results(place))
    cores, _, _, batch_size, instances, objective = first.split(")")[1].split()
    assert float(measured[cores, batch_size, instances]) == pytest.approx(
        float(objective), abs=0.01
    )
    assert machine.card(1).free == machine.card(1).total


def test_the_tutorial_of_2023(
    machine: Machine, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds = {name: {"min": 1, "max": 2} for name in ("cores", "mos", "ols", "bs", "instances")}
    asked = {
        "max_func_eval": 1, "objective": "minimize_latency",
        "params": {**bounds, "cores": {"min": 1, "max": 1}, "bs": {"min": 1, "max": 1}},
        "initial_values": [{"cores": 1, "mos": 1, "ols": 1, "bs": 1, "instances": 1}],
    }  # fmt: skip
    (place / "old.json").write_text(json.dumps(asked))
    argv = ["net.onnx", "onnx", *SYMBOLS, "-optimized-config-search", "old.json", "-iter", "3"]
    assert configurator.main([*argv, "-max-compilation-threads", "8", "-set-size", "1"]) == 0
    said = capsys.readouterr().out
    assert "Objective (micro-sec)" in said
    assert (
        place / "model_configurator_output/compiled_models/qpc-cores-1-mos-2-ols-1-bs-1-output"
    ).is_dir()
    best = float(said.splitlines()[-2].split()[-1])
    latencies = [float(row["latency (micro-sec)"]) for row in results(place)]
    assert min(latencies) * 0.99 < best <= max(latencies)
    # Again, in the same folder: the older programs are replaced.
    asked["params"] = {name: {"min": 1, "max": 1} for name in bounds}
    (place / "old.json").write_text(json.dumps(asked))
    assert configurator.main(argv) == 0


def test_a_grid_on_the_command_line(
    machine: Machine, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["-model", "net.onnx", *SYMBOLS, "-cores", "4,7", "-batchsize", "1,2", "-iter", "5"]
    assert configurator.main(argv) == 0
    found = {(r["cores"], r["batchSize"], r["instances"]) for r in results(place)}
    assert found == {("4", "1", "3"), ("4", "2", "3"), ("7", "1", "2"), ("7", "2", "2")}
    table = capsys.readouterr().out.splitlines()[-5:-1]
    rates = [float(line.split()[-1]) for line in table]
    assert rates == sorted(rates, reverse=True)


def test_a_point_that_cannot_be_compiled_is_passed_over(
    machine: Machine, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["-model", "net.onnx", SYMBOLS[0], "-cores", "14", "-iter", "2"]  # length has no value
    assert configurator.main(argv) == 1
    said = capsys.readouterr().out
    assert "[ERROR]: Failed to compile qpc-cores-14-mos-1-ols-1-bs-1-output" in said
    assert results(place) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"objective": "fame"}, "objective one of max-throughput, maximize_inf_rate"),
        ({"search-parameters": {"width": {}}}, "'width' is no parameter; they are cores, mos"),
        ({"search-parameters": {"cores": {"min": 3}}}, "cores needs min and max from 1 to 1024"),
        ({"initial-values": []}, "needs a list of initial values"),
        ({"initial-values": [{"cores": 14, "instances": 2}]}, "takes more than the 14 cores"),
        ({"initial-values": [{"cores": "14"}]}, "cores must be from 1 to 1024"),
        ({"max_func_eval": 0}, "max_func_eval is 0, not a positive number"),
        ({"static-params": {"mos": 0}}, "mos must be from 1 to 1024"),
    ],
)
def test_wrong_configuration_files(
    machine: Machine, place: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any],
    text: str,
) -> None:  # fmt: skip
    argv = ["-model", "net.onnx", *SYMBOLS, "-config", write_search(place, **change)]
    assert configurator.main(argv) == 2
    assert text in capsys.readouterr().err
    assert not (place / "model_configurator_output").exists()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["-model", "none.onnx"], "Failed to open file: none.onnx"),
        (["-model", "net.onnx", "-device-id", "9"], "Invalid device:9"),
        (["-model", "net.onnx", "-cores", "a"], "'a' must be numbers between commas"),
        (["-model", "net.onnx", "-cores", "15"], "no configuration fits the 14 cores"),
        ([], "no model is given: name an ONNX file with -model"),
        (["-model", "net.onnx", "-fast"], "unrecognized arguments: -fast"),
        (["-model", "net.onnx", "-time", "0"], "argument -time: '0' is not a positive number"),
        (["-model", "net.onnx", "net.onnx", "tensorflow"], "invalid choice: 'tensorflow'"),
    ],
)
def test_wrong_command_lines(
    machine: Machine, place: Path, capsys: pytest.CaptureFixture[str], argv: list[str], text: str
) -> None:
    assert configurator.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["search-mode", "objective", "params", "search-parameters", "initial-values", "max_func_eval"]
)


@given(content=st.dictionaries(KEYS, ANY) | ANY)
def test_any_configuration_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    path = tmp_path_factory.mktemp("search") / "search.json"
    path.write_text(json.dumps(content))
    try:
        bounds, starts, _, most = search.read_search(str(path), 1)
    except search.ConfigurationError:
        return
    assert len(bounds) == 6
    assert starts
    assert most >= 1


@given(
    costs=st.dictionaries(
        st.tuples(*[st.integers(1, 4)] * 6), st.floats(-1e6, 1e6) | st.just(math.inf), max_size=60
    ),
    starts=st.lists(st.tuples(*[st.integers(1, 2)] * 6), min_size=1, max_size=4),
    most=st.integers(1, 60),
)
def test_a_search_ends_where_no_neighbour_is_better(
    costs: dict[Point, float], starts: list[Point], most: int
) -> None:
    space = Space(((1, 4),) * 6, num_cores=8)
    evaluated: list[Point] = []

    def evaluate(points: list[Point]) -> dict[Point, float]:
        evaluated.extend(points)
        return {point: costs.get(point, 1e7) for point in points}

    found = climb(starts, space, evaluate, most)
    assert [one.start for one in found] == starts
    assert len(evaluated) == len(set(evaluated))
    assert all(space.holds(point) for point in evaluated)
    for one in found:
        assert one.cost == costs.get(one.best, 1e7)
        assert one.cost <= costs.get(one.start, 1e7)
        if one.status == search.SUCCESS:
            least = min(costs.get(p, 1e7) for p in space.neighbours(one.best))
            assert math.isinf(one.cost) or least >= one.cost - abs(one.cost) * GAIN
