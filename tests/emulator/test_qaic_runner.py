"""`qaic-runner`: inputs, files and figures, against onnxruntime and public readers."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from compiled import FUZZ_EXAMPLES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_nets import ROWS, adding_up, compile_net, inputs_of, truth, two_inputs

from qaic_ray.emulator import folder, runner
from qaic_ray.emulator.card import Machine
from qaic_ray.emulator.install import install
from qaic_ray.emulator.qaic import raw_stats
from qaic_ray.emulator.qaic.hosting import Flight, HostedProgram, Hosting
from qaic_ray.emulator.runner import api_test
from qaic_ray.emulator.runner.argv import HelpAsked, RunnerError, RunnerOptions, parse
from qaic_ray.emulator.runner.batches import open_source
from qaic_ray.emulator.tools import qaic_opstats, qaic_version_util

STATS = re.compile(
    r"^ ---- Stats ----\nInferenceCnt (\d+) TotalDuration (\d+)us BatchSize (\d+) "
    r"Inf/Sec (\d+\.\d{3})$",
    re.MULTILINE,
)


def stats(text: str) -> tuple[int, int, int, float]:
    found = STATS.search(text)
    assert found is not None, text
    return int(found[1]), int(found[2]), int(found[3]), float(found[4])


def raw_files(folder: Path, inputs: dict[str, Any]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in inputs.items():
        array.tofile(folder / f"{name}.raw")
    return [str(folder / f"{name}.raw") for name in inputs]


def entry(name: str, path: str, array: Any, side: str = "in") -> dict[str, Any]:
    """As public programs write it."""
    return {
        "path": path,
        "io-direction": side,
        "elem-size": array.itemsize,
        "map-to": name,
        "dims": list(array.shape),
    }


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_net(tmp_path_factory.mktemp("net"), two_inputs())


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        (["-t", "q"], {}),
        (["--test-data", "q", "-d", "3"], {"qids": (3,)}),
        (["-tq", "-D", "0:1:2:3"], {"qids": (0, 1, 2, 3)}),
        (["-test-data=q", "--dev-list=0"], {"qids": (0,)}),
        (["-t", "q", "-a", "7", "-S1", "-n5"],
         {"num_activations": 7, "set_size": 1, "num_iterations": 5}),
        (["-t", "q", "--time", "20", "-T", "8"], {"seconds": 20, "num_threads": 8}),
        (["-t", "q", "-i", "a", "-i", "b"], {"input_files": ("a", "b")}),
        (["-t", "q", "-vvv", "trace"], {"verbosity": 3}),
        (["-t", "q", "-c", "--bound-random"], {"compares": True}),
        (["-t", "q", "--aic-num-of", "2"], {"num_activations": 2}),
        (["-t", "q", "--aic-profiling-type=trace", "--aic-profiling-type", "latency"],
         {"profiling_types": ("trace", "latency")}),
        (["-t", "q", "-l", "-p", "on"],
         {"without_effect": ("--live-reporting", "--pre-post-processing")}),
    ],
)  # fmt: skip
def test_command_lines_that_public_programs_use(argv: list[str], changed: dict[str, Any]) -> None:
    assert parse(argv) == RunnerOptions(qpc="q")._replace(**changed)


def test_write_output_dir_with_one_dash(tmp_path: Path) -> None:
    options = parse(["-t", "q", "-write-output-dir", str(tmp_path / "new")])
    assert (options.writes_outputs, options.output_dir) == (True, str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "Error: Missing test data path"),
        (["-t"], "option -- 't' requires an argument"),
        (["-t", "q", "-n", "0"], "Set a positive value for num-iter"),
        (["-t", "q", "-n", "x"], "Set a positive value for num-iter"),
        (["-t", "q", "-d", "-1"], "Set a valid aic-device-id"),
        (["-t", "q", "--frobnicate"], "unrecognized option '--frobnicate'"),
        (["-t", "q", "-Q"], "unrecognized option '-Q'"),
        (["-t", "q", "--aic-batch"], "option '--aic-batch' is ambiguous"),
        (["-t", "q", "--verbose=1"], "option '--verbose' doesn't allow an argument"),
        (["-t", "q", "--write-output-start-iter", "-1"],
         "Set non-negative value for write-output-start-iter"),
        (["-t", "q", "-n", "3", "--write-output-start-iter", "3"],
         r"The sum of write-output-start-iter\(3\) and write-output-num-samples\(1\) should be "
         r"<= numInf\(3\)."),
        (["-t", "q", "--write-output-dir", "/proc/none"], "Invalid output dir: /proc/none"),
        (["-t", "q", "--aic-profiling-type", "ascii"], "Invalid profiling type 'ascii'"),
        (["-t", "q", "-i", "a", "--aic-batch-json-input", "b"], "given in one way"),
    ],
)  # fmt: skip
def test_command_lines_that_are_refused(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunnerError, match=text):
        parse(argv)
    assert runner.main(argv) == 1
    said = capsys.readouterr()
    assert "Failed to validate arguments" in said.err
    assert said.out.startswith("Usage: qaic-runner [options]\n")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HelpAsked):
        parse(["-h"])
    assert runner.main(["--help"]) == 0
    assert "-t, --test-data" in capsys.readouterr().out


def test_raw_inputs_in_the_models_order_and_output_files(
    machine: Machine, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = inputs_of(3)
    argv = ["-t", str(net), "-d", "1", "-a", "3", "-S", "2", "-n", "12"]
    for path in raw_files(tmp_path / "in", inputs):
        argv += ["-i", path]
    out = tmp_path / "out"
    argv += ["-write-output-dir", str(out), "--write-output-start-iter", "1"]
    assert runner.main(argv) == 0
    said = capsys.readouterr().out
    count, micros, batch, rate = stats(said)
    assert (count, batch) == (12, ROWS)
    assert rate == pytest.approx(count * batch / (micros / 1e6), rel=1e-3)
    expected = truth(two_inputs(), inputs)
    names = {f"{name}-activation-{a}-inf-1.bin" for name in expected for a in range(3)}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        assert f"Writing file:{out}/{name}" in said
        array = expected[name.partition("-")[0]]
        found = np.fromfile(out / name, array.dtype).reshape(array.shape)
        np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-6)
    assert machine.card(1).free == machine.card(1).total


def test_one_row_is_repeated_for_a_larger_batch(
    machine: Machine, net: Path, tmp_path: Path
) -> None:
    inputs = inputs_of(4, rows=1)
    argv = ["-t", str(net), "-n", "1", "--write-output-dir", str(tmp_path)]
    for path in raw_files(tmp_path / "in", inputs):
        argv += ["-i", path]
    assert runner.main(argv) == 0
    found = np.fromfile(tmp_path / "scores-activation-0-inf-0.bin", np.float32)
    expected = truth(two_inputs(), inputs)["scores"]
    np.testing.assert_allclose(found.reshape(ROWS, -1), expected.repeat(ROWS, 0), rtol=1e-5)
    assert runner.main([*argv, "--auto-batch-input", "0"]) == 1


def test_batches_of_a_json_run_in_order_and_the_state_stays(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qpc = compile_net(tmp_path, adding_up(), "-retained-state")
    xs = np.random.default_rng(0).integers(0, 9, (5, 1, 3)).astype(np.float32)
    rows = []
    for number, x in enumerate(xs):
        x.tofile(tmp_path / f"x{number}.raw")
        row = [entry("x", f"x{number}.raw", x)]
        if number == 2:  # an empty file means that the state stays, too
            (tmp_path / "none.raw").write_bytes(b"")
            row.append({**entry("total", "none.raw", x), "dims": [0]})
        if number == 3:
            x.tofile(tmp_path / "total.raw")
            row.append(entry("total", "total.raw", x))
        rows.append(row)
    doubled = 2 * (xs[:3].cumsum(axis=0))
    expected = [*doubled, 4 * xs[3], 4 * xs[3] + 2 * xs[4]]
    for number, array in enumerate(expected):
        array.tofile(tmp_path / f"y{number}.raw")
        rows[number].append(entry("doubled", f"y{number}.raw", array, "out"))
    path = tmp_path / "aic_batch_io.json"
    path.write_text(json.dumps({"IO-files": rows}))
    out = tmp_path / "out"
    argv = ["-t", str(qpc), "--aic-batch-json-input", str(path), "-c", "-v"]
    written = ["--write-output-dir", str(out), "--write-output-num-samples", "5"]
    assert runner.main([*argv, *written]) == 0
    said = capsys.readouterr().out
    assert stats(said)[0] == 5  # each once
    assert "Output validation successful!" in said
    for number, array in enumerate(expected):
        found = np.fromfile(out / f"doubled-activation-0-inf-{number}.bin", np.float32)
        np.testing.assert_array_equal(found, array.reshape(-1))
    (expected[1] + 1).tofile(tmp_path / "y1.raw")
    assert runner.main(argv) == 1
    said_of_it = capsys.readouterr().err
    assert "Validation Failed for iteration 1, num failed: 1, num passed: 0 (doubled)" in said_of_it


def test_outputs_are_compared_byte_for_byte(
    machine: Machine, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["-t", str(net), "-n", "3"]
    assert runner.main([*argv, "--write-output-dir", str(tmp_path)]) == 0
    host = HostedProgram(str(net), Hosting(set_size=1))
    files = [f"{tmp_path}/{b.name}-activation-0-inf-0.bin" for b in host.outputs]
    host.close()
    argv += [part for path in files for part in ("-o", path)]
    assert runner.main(argv) == 0
    data = bytearray(Path(files[0]).read_bytes())
    data[0] ^= 1
    Path(files[0]).write_bytes(data)
    assert runner.main(argv) == 1
    assert capsys.readouterr().err.count("Validation Failed for iteration") == 3
    assert runner.main(argv[:-2]) == 1
    assert "Number of output files (1) is not that of the outputs (2)" in capsys.readouterr().err


@pytest.mark.parametrize(("version", "first"), [("1.17", 0), ("1.20", 1), ("1.22", 1)])
def test_latency_files_are_numbered_as_in_their_version(
    machine: Machine, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str,
    first: int,
) -> None:  # fmt: skip
    """The performance tutorials of 2023 read programs 0 to 6, that of 2025 programs 1 to 7."""
    install(tmp_path / "sdk", apps_version=version)
    monkeypatch.setenv(folder.ROOT_VARIABLE, str(tmp_path / "sdk"))
    argv = ["-t", str(net), "-a", "7", "-n", "14", "--aic-profiling-out-dir", str(tmp_path / "out")]
    assert runner.main([*argv, "--aic-profiling-type", "latency"]) == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    expected = range(first, first + 7)
    assert found == {f"aic-profiling-program-{number}-latency.txt" for number in expected}


def test_the_latency_file_as_public_programs_read_it(
    machine: Machine, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["-t", str(net), "-a", "2", "-S", "3", "-n", "60", "--aic-profiling-out-dir"]
    argv += [str(tmp_path), "--aic-profiling-start-iter", "10"]
    argv += ["--aic-profiling-num-samples", "99999", "--aic-profiling-type", "latency"]
    assert runner.main([*argv, "--aic-profiling-type", "trace"]) == 0
    for activation in (1, 2):
        path = tmp_path / f"aic-profiling-program-{activation}-latency.txt"
        # The vendor's classifier and BERT samples, and its latency_stats tutorial.
        frame = pandas.read_csv(path, skiprows=4, skipinitialspace=True)
        assert list(frame["Sample"]) == list(range(10, 30))
        whole = frame[frame.columns[-3]]
        assert whole.name == "totalRoundtripTimeUs"
        assert (whole >= frame["execTotalUs"]).all()
        parts = frame["exectoVcUs"] + frame["execToCompleteUs"]
        np.testing.assert_allclose(parts, frame["execTotalUs"], atol=0.01)
        times = frame.drop(["Sample", "queueDepth", "numInfInQueue"], axis=1)
        assert (times >= 0).all().all()
        assert set(frame["queueDepth"]) == {3}
        content = json.loads(
            (tmp_path / f"aic-profiling-program-{activation}-trace.json").read_text()
        )
        runs = [event for event in content["traceEvents"] if event["name"] == "Execute"]
        np.testing.assert_allclose(
            [event["dur"] for event in runs], frame["execToCompleteUs"], atol=0.01
        )
    assert runner.main(argv) == 0
    assert "Deleting previous file: " in capsys.readouterr().out


def test_random_inputs_for_a_time(
    machine: Machine, net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(["-t", str(net / "programqpc.bin"), "--time", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Using bounded random inputs\n")
    assert 1_000_000 <= stats(said)[1] < 20_000_000
    assert runner.main(["-t", str(net)]) == 0
    assert stats(capsys.readouterr().out)[0] == 40
    # Any word is beyond this vocabulary.
    assert runner.main(["-t", str(net), "--unbound-random", "-n", "2"]) == 1
    assert "Inference run failed" in capsys.readouterr().err
    assert machine.card(0).free == machine.card(0).total


def test_hundreds_of_inferences_leave_nothing(machine: Machine, net: Path) -> None:
    def left() -> tuple[int, int, int]:
        gc.collect()
        flights = sum(type(each) is Flight for each in gc.get_objects())
        return len(os.listdir("/proc/self/fd")), threading.active_count(), flights

    argv = ["-t", str(net), "-a", "2", "-S", "4", "-n", "8"]
    assert runner.main(argv) == 0
    _wait_for_queues()
    before = left()
    assert runner.main([*argv[:-1], "400"]) == 0
    _wait_for_queues()
    assert left() == before


def _wait_for_queues() -> None:
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "qaic-queue":
            thread.join(timeout=60)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["-d", "9"], "Invalid device:9\nFailed to initialize QAIC runner"),
        (["-a", "15"], "QAIC_ERROR_NSP_ALLOC_FAILED: Failed to allocate NSP resources"),
        (["-D", "0:1"], "Failed to create program with Qpc Buffer"),
        (["-i", "none.raw"], "Number of input files (1) is not that of the inputs (2): features, "),
        (["-i", "none.raw", "-i", "n"], "Failed to open file: none.raw: No such file or directory"),
        (["-i", "short.raw", "-i", "short.raw"],
         "Input file short.raw has 3 bytes; input 'features' of [2, 4] float32 takes 32"),
        (["--aic-batch-json-input", "none.json"], "Failed to open file: none.json"),
        (["--aic-batch-input-directory", "none"], "Failed to open directory: none"),
        (["--aic-batch-input-file-list", "empty.txt"], "empty.txt names no files"),
    ],
)  # fmt: skip
def test_runs_that_fail(
    machine: Machine, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], argv: list[str], text: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.raw").write_bytes(b"abc")
    (tmp_path / "empty.txt").write_text("")
    assert runner.main(["-t", str(net), "-n", "2", *argv]) == 1
    assert text in capsys.readouterr().err
    assert machine.card(0).free == machine.card(0).total


def test_no_program(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["-t", str(tmp_path)]) == 1
    assert "Failed to open file" in capsys.readouterr().err


def test_files_of_a_list(machine: Machine, net: Path, tmp_path: Path) -> None:
    lines = [",".join(raw_files(tmp_path / str(seed), inputs_of(seed))) for seed in range(3)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    argv = ["-t", str(net), "--aic-batch-input-file-list", str(tmp_path / "list.txt")]
    written = ["--write-output-dir", str(tmp_path), "--write-output-num-samples", "3"]
    assert runner.main([*argv, *written]) == 0
    for seed in range(3):
        found = np.fromfile(tmp_path / f"best-activation-0-inf-{seed}.bin", np.int64)
        np.testing.assert_array_equal(found, truth(two_inputs(), inputs_of(seed))["best"])


GOOD = {"path": "f.raw", "io-direction": "in", "elem-size": 4, "map-to": "features", "dims": [2, 4]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[]", "'IO-files' must be a list of lists"),
        ("{", "is not JSON"),
        ({"IO-files": []}, "'IO-files' must be a list of lists"),
        ({"IO-files": [[3]]}, "a file must be an object, not 3"),
        ({"IO-files": [[{**GOOD, "io-direction": "up"}]]}, "must be in or out, not 'up'"),
        ({"IO-files": [[{**GOOD, "map-to": "x"}]]}, "'x' is no input of the program: features"),
        ({"IO-files": [[{**GOOD, "path": 1}]]}, "'features' needs the 'path' of a file"),
        ({"IO-files": [[{**GOOD, "elem-size": 8}]]}, "elements of 4 bytes"),
        (
            {"IO-files": [[{**GOOD, "dims": [-1]}]]},
            "'dims' of 'features' must be a list of numbers",
        ),
        ({"IO-files": [[GOOD, GOOD]]}, "entry 0 has 'features' twice"),
        ({"IO-files": [[GOOD]]}, "input 'words' is missing"),
        ({"IO-files": [[{**GOOD, "dims": [3, 4]}]]}, "f.raw has 32 bytes; input 'features' of"),
    ],
)
def test_a_json_that_is_refused(
    machine: Machine, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    content: Any, text: str,
) -> None:  # fmt: skip
    path = tmp_path / "io.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    np.zeros((2, 4), np.float32).tofile(tmp_path / "f.raw")
    assert runner.main(["-t", str(net), "--aic-batch-json-input", str(path)]) == 1
    assert text in capsys.readouterr().err


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["IO-files", "path", "io-direction", "elem-size", "map-to", "dims", "x"]
            ),
            inner | st.sampled_from(["in", "out", "features", "words", "scores", "f.raw", 4, 8]),
            max_size=6,
        )
    ),
    max_leaves=12,
)
FILES = st.fixed_dictionaries({"IO-files": st.lists(st.lists(ANY, max_size=3), max_size=3)})


@pytest.fixture
def host(machine: Machine, net: Path) -> Iterator[HostedProgram]:
    with contextlib.closing(HostedProgram(str(net), Hosting(set_size=1))) as opened:
        yield opened


@settings(
    max_examples=FUZZ_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=ANY | FILES)
def test_any_json_is_read_or_refused(content: Any, host: HostedProgram, tmp_path: Path) -> None:
    path = tmp_path / "io.json"
    path.write_text(json.dumps(content))
    (tmp_path / "f.raw").write_bytes(bytes(32))
    with contextlib.suppress(RunnerError):
        source = open_source(host, RunnerOptions(qpc="q", batch_json=str(path), compares=True))
        for index in range(source.count):
            source.batch(index)


@settings(max_examples=FUZZ_EXAMPLES, deadline=None)
@given(
    argv=st.lists(
        st.text(max_size=6)
        | st.sampled_from(["-t", "q", "-n", "-S2", "--time", "-vvt", "-D", "0:1", "--num-iter=3"]),
        max_size=8,
    )
)
def test_any_command_line_is_read_or_refused(argv: list[str]) -> None:
    with contextlib.suppress(RunnerError, HelpAsked):
        assert parse(argv).qpc


@pytest.mark.parametrize(
    ("argv", "lines", "status"),
    [
        ([], ["platform:AIC.1.20.0", "apps:AIC.1.20.0", "factory:not found"], 0),
        (["--apps"], ["apps:AIC.1.20.0"], 0),
        (["--platform"], ["platform:AIC.1.20.0"], 0),
        (["--factory"], ["factory:not found"], 1),
        (["--nonsense"], [], 1),
    ],
)
def test_version_util(
    machine: Machine, capsys: pytest.CaptureFixture[str], argv: list[str], lines: list[str],
    status: int,
) -> None:  # fmt: skip
    assert qaic_version_util.main(argv) == status
    assert capsys.readouterr().out.splitlines() == lines


def test_raw_statistics_and_what_opstats_makes_of_them(
    machine: Machine, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, made = tmp_path / "raw", tmp_path / "made"
    argv = ["-t", str(net), "-n", "20", "-S", "2", "--aic-profiling-out-dir", str(raw)]
    argv += ["--aic-profiling-start-iter", "5", "--aic-profiling-num-samples", "3"]
    argv += ["--aic-profiling-type", "raw_device_stats", "--aic-profiling-type", "latency"]
    assert api_test.main(argv) == 0
    said = capsys.readouterr().out
    # As ai100-profiling reads it: the first number after the metric's name.
    report = said.partition("Aggregated Device Metrics Report")[2].splitlines()
    metric, average, *_ = (cell.strip() for cell in report[2].split(","))
    assert metric == "ExecTimeUs_Func_0"
    frame = pandas.read_csv(
        raw / "aic-profiling-program-1-latency.txt", skiprows=4, skipinitialspace=True
    )
    assert float(average) == pytest.approx(frame["execToCompleteUs"].mean(), rel=1e-3)
    (raw / "aic-profiling-program-1-latency.txt").unlink()
    decode = ["--qpc", str(net / "programqpc.bin"), "--input-dir", str(raw), "--output-dir"]
    assert qaic_opstats.main([*decode, str(made), "--summary", "--trace"]) == 0
    stems = [f"aic-profiling-program-0-activation-0-inf-{number}" for number in (5, 6, 7)]
    assert {path.name for path in made.iterdir()} == {
        f"{stem}.qaic-opstats.{ending}"
        for stem in stems
        for ending in ("summary.txt", "trace.json")
    }
    for number, stem in enumerate(stems):
        events = json.loads((made / f"{stem}.qaic-opstats.trace.json").read_text())["traceEvents"]
        (ran,) = [event["dur"] for event in events if event["name"] == "Execute"]
        assert ran == pytest.approx(frame["execToCompleteUs"][number], abs=0.01)
        table = (made / f"{stem}.qaic-opstats.summary.txt").read_text()
        assert re.search(rf" {ran:.3f} +\d+\.\d\d%  Execute\n", table)
    (raw / "foreign.bin").write_bytes(b"\x00vendor")
    assert qaic_opstats.main([*decode, str(made)]) == 1
    assert "foreign.bin is no raw statistics file" in capsys.readouterr().err
    assert qaic_opstats.main([*decode[:2], "--input-dir", str(tmp_path / "in")]) == 1
    assert "holds no raw statistics" in capsys.readouterr().err


@given(data=st.binary(max_size=60) | ANY.map(lambda value: json.dumps(value).encode()))
def test_any_raw_file_is_read_or_refused(data: bytes) -> None:
    for content in (data, raw_stats.MAGIC + data):
        with contextlib.suppress(raw_stats.RawStatsError):
            raw_stats.summary("n", raw_stats.parse(content, "f").events)
