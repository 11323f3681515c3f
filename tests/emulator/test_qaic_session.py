"""`qaic.Session` against onnxruntime, and against the vendor's documented texts."""

from __future__ import annotations

import base64
import concurrent.futures
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_nets import ROWS, adding_up, compile_net, inputs_of, truth, two_inputs

from qaic_ray.emulator import folder, wheel
from qaic_ray.emulator.card import Machine
from qaic_ray.emulator.qaic import Session
from qaic_ray.emulator.qaic.measurements import Latencies
from qaic_ray.emulator.qaic.options import read_options

OPTIONS = """
aic-num-cores: 2
num_activations: 2
convert_to_fp16: false
compile-only: true
onnx_define_symbol:
  batch: 2
  length: 5
"""


def assert_right(found: dict[str, Any], inputs: dict[str, Any], model: Any) -> None:
    expected = truth(model, inputs)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


def test_outputs_whose_shape_varies_are_fetched_in_each_specialization(
    machine: Machine, tmp_path: Path
) -> None:
    model = two_inputs()
    entries = [{"batch": str(rows), "length": "5"} for rows in (ROWS, 2 * ROWS)]
    (tmp_path / "shapes.json").write_text(json.dumps({"specializations": entries}))
    shapes = f"-network-specialization-config={tmp_path / 'shapes.json'}"
    session = Session(str(compile_net(tmp_path / "net", model, shapes) / "programqpc.bin"))
    for rows in (ROWS, 2 * ROWS, ROWS):
        inputs = inputs_of(rows, rows)
        assert_right(session.run(inputs), inputs, model)
    with pytest.raises(ValueError, match="input 'words' is missing"):
        session.run({"features": inputs["features"]})
    session.reset()


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    path = tmp_path / "model" / "net.onnx"
    path.parent.mkdir()
    onnx.save(two_inputs(), path)
    (path.parent / "options.yaml").write_text(OPTIONS)
    return path


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_qpc_gives_what_onnxruntime_gives(machine: Machine, tmp_path: Path, form: str) -> None:
    model = two_inputs()
    qpc = compile_net(tmp_path, model)
    session = Session(model_path=str(qpc / "programqpc.bin" if form == "file" else qpc), dev_id=1)
    shape, kind = session.model_input_shape_dict["features"]
    assert (shape, kind) == ((ROWS, 4), np.float32)
    assert session.model_output_shape_dict()["best"] == ((ROWS,), np.int64)
    assert list(session.model_input_shape_dict()) == ["features", "words"]
    session.setup()
    assert machine.card(1).free.num_nsps == 13
    inputs = inputs_of(1)
    outputs = session.run(inputs)
    assert_right(outputs, inputs, model)
    # As the samples read it.
    raw = np.frombuffer(outputs["scores"], dtype=kind).reshape(outputs["scores"].shape)
    np.testing.assert_array_equal(raw, outputs["scores"])
    session.reset()
    assert machine.card(1).free == machine.card(1).total
    assert_right(session.run(inputs), inputs, model)
    session.reset()


def test_an_onnx_file_is_compiled_once(machine: Machine, onnx_file: Path) -> None:
    options = str(onnx_file.parent / "options.yaml")
    inputs = inputs_of(2)
    session = Session(str(onnx_file), options_path=options)
    assert_right(session.run(inputs), inputs, two_inputs())
    assert machine.card(0).free.num_nsps == 14 - 2 * 2
    session.reset()
    (made,) = (onnx_file.parent / ".qaic-cache").glob("net-*/programqpc.bin")
    first = made.stat()
    Session(str(onnx_file), options_path=options)
    assert made.stat().st_mtime_ns == first.st_mtime_ns
    assert made.stat().st_ino == first.st_ino
    Session(str(onnx_file), options_path=options, aic_num_cores=4)
    onnx.save(two_inputs(seed=9), onnx_file)
    changed = Session(str(onnx_file), options_path=options)
    assert_right(changed.run(inputs), inputs, two_inputs(seed=9))
    changed.reset()
    assert len(list(made.parents[1].iterdir())) == 3


def test_external_weights_are_part_of_the_key(machine: Machine, onnx_file: Path) -> None:
    options = str(onnx_file.parent / "options.yaml")
    for seed in (1, 2):
        onnx.save(
            two_inputs(seed), onnx_file, save_as_external_data=True, location="w", size_threshold=0
        )
        session = Session(str(onnx_file), options_path=options)
        assert_right(session.run(inputs_of(seed)), inputs_of(seed), two_inputs(seed))
        session.reset()


def test_the_cache_of_a_model_that_lies_where_nothing_can_be_written(
    machine: Machine, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = str(onnx_file.parent / "options.yaml")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    session = Session(str(onnx_file), options_path=options)
    assert_right(session.run(inputs_of(0)), inputs_of(0), two_inputs())
    session.reset()
    (apart,) = (tmp_path / "temporary").iterdir()
    assert apart.stat().st_mode & 0o777 == 0o700
    assert not (onnx_file.parent / ".qaic-cache").exists()
    shutil.rmtree(apart)
    apart.symlink_to(tmp_path)
    with pytest.raises(RuntimeError, match="belongs to someone else"):
        Session(str(onnx_file), options_path=options)


def test_output_dir(machine: Machine, onnx_file: Path, tmp_path: Path) -> None:
    options = str(onnx_file.parent / "options.yaml")
    target = tmp_path / "mine"
    for cores in (2, 2, 3):
        session = Session(str(onnx_file), options, output_dir=str(target), aic_num_cores=cores)
        session.setup()
        assert machine.card(0).free.num_nsps == 14 - 2 * cores
        session.reset()
    assert (target / "programqpc.bin").is_file()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("")
    with pytest.raises(RuntimeError, match="was not made by a session"):
        Session(str(onnx_file), options, output_dir=str(foreign))
    assert (foreign / "thesis.txt").exists()


def test_what_the_compiler_says_is_in_the_error(machine: Machine, onnx_file: Path) -> None:
    with pytest.raises(RuntimeError, match="-aic-num-cores: must be in"):
        Session(str(onnx_file), aic_num_cores=99)
    assert not (onnx_file.parent / ".qaic-cache" / "net").exists()
    (onnx_file.parent / "bad.onnx").write_bytes(b"no")
    with pytest.raises(RuntimeError, match=r"bad.onnx is not an ONNX model"):
        Session(str(onnx_file.parent / "bad.onnx"))


def test_threads_get_their_own_results(machine: Machine, tmp_path: Path) -> None:
    model = two_inputs()
    session = Session(str(compile_net(tmp_path, model)), num_activations=2, set_size=2)
    given = [inputs_of(seed) for seed in range(40)]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        results = list(pool.map(session.run, given))
    for inputs, found in zip(given, results, strict=True):
        assert_right(found, inputs, model)
    session.reset()


def test_a_state_stays_on_the_card_until_it_is_given(machine: Machine, tmp_path: Path) -> None:
    session = Session(str(compile_net(tmp_path, adding_up(), "-retained-state")), set_size=3)
    x = np.array([[1, 2, 3]], np.float32)
    for count in (1, 2, 3):
        found = session.run({"x": x})
        assert list(found) == ["doubled"]
        np.testing.assert_array_equal(found["doubled"], 2 * count * x)
    found = session.run({"x": x, "total": np.full((1, 3), 10, np.float32)})
    np.testing.assert_array_equal(found["total_RetainedState"], x + 10)
    np.testing.assert_array_equal(session.run({"x": x})["doubled"], 2 * (2 * x + 10))
    session.reset()
    np.testing.assert_array_equal(session.run({"x": x})["doubled"], 2 * x)
    session.reset()


def test_a_session_that_is_forgotten_gives_the_device_back(
    machine: Machine, tmp_path: Path
) -> None:
    path = str(compile_net(tmp_path, two_inputs(), "-aic-num-cores=14"))
    for name in ("", "group1"):
        session = Session(path, oversubscription_name=name)
        session.run(inputs_of(0))
        assert machine.card(0).free.num_nsps == 0
        del session
        wait_until_free(machine)


def wait_until_free(machine: Machine) -> None:
    """A queue's thread lets go of the program a moment after its last inference."""
    for _ in range(1000):
        gc.collect()
        if machine.card(0).free == machine.card(0).total:
            return
        time.sleep(0.01)
    raise AssertionError(f"still taken: {machine.card(0).free}")


def test_sessions_of_one_name_share_the_cores(machine: Machine, tmp_path: Path) -> None:
    model = two_inputs()
    paths = [
        str(compile_net(tmp_path / str(cores), model, f"-aic-num-cores={cores}"))
        for cores in (14, 9)
    ]
    alone = Session(paths[0])
    alone.setup()
    with pytest.raises(RuntimeError, match="QAIC_ERROR_NSP_ALLOC_FAILED"):
        Session(paths[1]).setup()
    alone.reset()
    both = [Session(path, set_size=1, oversubscription_name="group1") for path in paths]
    for seed in range(4):
        for session in both:
            assert_right(session.run(inputs_of(seed)), inputs_of(seed), model)
    assert machine.card(0).free.num_nsps == 0
    both[0].reset()
    assert_right(both[1].run(inputs_of(9)), inputs_of(9), model)
    both[1].reset()
    assert machine.card(0).free == machine.card(0).total


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda i: i.pop("words"), "input 'words' is missing; the model takes features, words"),
        (lambda i: i.update(other=1), "'other' is no input of the model"),
        (
            lambda i: i.update(features=i["features"].astype("i4")),
            r"input 'features' must be float32, not int32; convert it with astype\('float32'\)",
        ),
        (
            lambda i: i.update(words=i["words"].astype("f4")),
            r"input 'words' must be int64, not float32; convert it with astype\('int64'\)",
        ),
        (
            lambda i: i.update(words=i["words"].astype("u8") + (1 << 63)),
            r"input 'words' must be int64, not uint64; convert it with astype\('int64'\)",
        ),
        (
            lambda i: i.update(features=i["features"][:1]),
            r"No matching dimension found for features\[1, 4\], words\[2, 5\]; the program takes "
            r"features\[2, 4\], words\[2, 5\]",
        ),
    ],
)
def test_wrong_inputs(
    machine: Machine, tmp_path: Path, change: Callable[[dict[str, Any]], Any], text: str
) -> None:
    model = two_inputs()
    session = Session(str(compile_net(tmp_path, model)), set_size=1)
    inputs = inputs_of(0)
    change(inputs)
    with pytest.raises(ValueError, match=text):
        session.run(inputs)
    assert_right(session.run(inputs_of(0)), inputs_of(0), model)  # and no place was lost
    session.reset()


def program_of(script: str, sdk: Path) -> subprocess.CompletedProcess[str]:
    """A program of its own that has the SDK's module."""
    (library,) = sdk.glob("dev/lib/*")
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(library)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_program_that_ends_without_a_reset_ends_quietly(
    machine: Machine, tmp_path: Path, sdk: Path
) -> None:
    # As the vendor's Whisper sample: two sessions of one name, and the end of the script.
    paths = [str(compile_net(tmp_path / name, two_inputs())) for name in ("encoder", "decoder")]
    script = (
        "import numpy as np, qaic\n"
        f"both = [qaic.Session(path, oversubscription_name='group1') for path in {paths!r}]\n"
        "inputs = {'features': np.ones((2, 4), 'f4'), 'words': np.ones((2, 5), 'i8')}\n"
        "print([session.run(inputs)['scores'].shape for session in both])\n"
    )
    done = program_of(script, sdk)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[(2, 3), (2, 3)]\n", "")


def test_a_program_of_a_group_that_an_inference_ends_says_only_why(
    machine: Machine, tmp_path: Path, sdk: Path
) -> None:
    # What fails is held by the traceback until the very end, and so is its ExecObj.
    path = str(compile_net(tmp_path, two_inputs()))
    script = (
        "import numpy as np, qaic\n"
        f"session = qaic.Session({path!r}, oversubscription_name='group1')\n"
        "session.run({'features': np.ones((2, 4), 'f4'), 'words': np.full((2, 5), 1000)})\n"
    )
    done = program_of(script, sdk)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "indices element out of data bounds" in lines[0]
    assert lines[1].startswith("Traceback")
    assert lines[-1] == "RuntimeError: Inference run failed: QStatus.QS_ERROR"


def test_inputs_of_another_width_are_converted(machine: Machine, tmp_path: Path) -> None:
    model = two_inputs()
    session = Session(str(compile_net(tmp_path, model)))
    inputs = inputs_of(4)
    # The vendor's DETR tutorial gives numpy's default, float64.
    wide = {"features": inputs["features"].astype("f8"), "words": inputs["words"].astype("i2")}
    assert_right(session.run(wide), inputs, model)
    session.reset()


def test_a_failed_inference_raises_and_gives_its_place_back(
    machine: Machine, tmp_path: Path
) -> None:
    model = two_inputs()
    session = Session(str(compile_net(tmp_path, model)), set_size=1)
    inputs = inputs_of(0)
    with pytest.raises(RuntimeError, match="Inference run failed"):
        session.run({**inputs, "words": np.full_like(inputs["words"], 1000)})
    assert_right(session.run(inputs), inputs, model)
    session.reset()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"num_activation": 2}, "unknown option num_activation; did you mean num_activations?"),
        ({"xyzzy": 2}, "unknown option xyzzy; options of a session: dev_id, num_activations"),
        ({"set_size": 0}, "set_size must be a number from 1 on, not 0"),
        ({"num_activations": True}, "num_activations must be a number from 1 on, not True"),
        ({"dev_id": "0"}, "dev_id must be a number from 0 on, not '0'"),
        ({"enable_metrics": 1}, "enable_metrics must be true or false, not 1"),
        (
            {"enable_metrics": True, "enable_profiling": True},
            "enable_metrics and enable_profiling cannot be used together",
        ),
        ({"backend": "qnn"}, "backend 'qnn' is not supported"),
        (
            {"oversubscription_name": "g", "num_activations": 2},
            "oversubscription_name needs num_activations=1",
        ),
        ({"onnx_define_symbol": 3}, r"onnx_define_symbol must be a list of \(symbol, value\)"),
        (
            {"onnx_define_symbol": [3]},
            r"onnx_define_symbol must have pairs \(symbol, value\), not 3",
        ),
        ({"mos": {}}, "mos cannot be a dict of 0"),
    ],
)
def test_wrong_options(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_options(None, given)


def test_options_become_the_compilers_flags(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(
        OPTIONS + "mos: [1, 2]\ncustom_io_list_file: io.yaml\nmulticast-weights: true\n"
    )
    options = read_options(str(path), {"num_activations": 3, "ols": 2, "dev_id": 1})
    assert (options.num_activations, options.dev_id) == (3, 1)
    assert sorted(options.compile_flags) == [
        "-aic-num-cores=2",
        "-custom-IO-list-file=io.yaml",
        "-mos=1,2",
        "-multicast-weights",
        "-ols=2",
        "-onnx-define-symbol=batch,2",
        "-onnx-define-symbol=length,5",
    ]
    with pytest.raises(ValueError, match="Failed to open file"):
        read_options(str(tmp_path / "none.yaml"), {})
    path.write_text("- 1")
    with pytest.raises(ValueError, match="must be a mapping"):
        read_options(str(path), {})


def test_benchmark(machine: Machine, tmp_path: Path) -> None:
    session = Session(str(compile_net(tmp_path, two_inputs())), num_activations=2, set_size=2)
    completed, rate, micros, batch = session.run_benchmark()
    assert (completed, batch) == (40, ROWS)
    assert rate == pytest.approx(completed * batch / (micros / 1e6), rel=1e-2)
    assert session.run_benchmark(num_inferences=7, input_dict=inputs_of(0))[0] == 7
    completed, _, micros, _ = session.run_benchmark(inf_time=1)
    assert completed > 0
    assert micros >= 1_000_000
    with pytest.raises(ValueError, match="cannot be used together"):
        session.run_benchmark(num_inferences=1, inf_time=1)
    with pytest.raises(ValueError, match="num_inferences must be a positive number, not 0"):
        session.run_benchmark(num_inferences=0)
    session.reset()


def test_metrics_are_those_of_the_formula_and_of_the_vendors_text() -> None:
    latencies = Latencies()
    with pytest.raises(RuntimeError, match="No inference was run yet"):
        latencies.metrics()
    used = np.linspace(0.001, 0.1, 999)
    for seconds in (5.0, *used):  # the first one is left out
        latencies.add(float(seconds))
    found = latencies.metrics()
    assert found["num_of_inferences"] == 999
    for name, percent in (("P25", 25), ("P50", 50), ("P99", 99), ("P999", 99.9)):
        assert found[name] == np.percentile(used, percent)
    assert found["avg_latency"] == pytest.approx(used.mean())
    assert found["total_inference_time"] == pytest.approx(used.sum())
    assert (found["min_latency"], found["max_latency"]) == (used.min(), used.max())
    average = f"Average latency / inference time observed is {found['avg_latency']} s"
    assert latencies.lines() == [
        "Number of inferences utilized for calculation are 999",
        f"Minimum latency observed {found['min_latency']} s",
        f"Maximum latency observed {found['max_latency']} s",
        average,
        f"P25 / 25% of inferences observed latency less than {found['P25']} s",
        f"P50 / 50% of inferences observed latency less than {found['P50']} s",
        f"P75 / 75% of inferences observed latency less than {found['P75']} s",
        f"P90 / 90% of inferences observed latency less than {found['P90']} s",
        f"P99 / 99% of inferences observed latency less than {found['P99']} s",
        f"Sum of all the inference times {found['total_inference_time']} s",
        average,
    ]


def test_metrics_and_profile_of_a_session(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(compile_net(tmp_path, two_inputs()))
    plain = Session(path)
    for call in (plain.print_metrics, plain.get_metrics, plain.print_profile_data):
        with pytest.raises(RuntimeError, match="Set enable_"):
            call()
    session = Session(path, enable_profiling=True)
    for _ in range(4):
        session.run(inputs_of(0))
    assert session.get_metrics()["num_of_inferences"] == 3
    capsys.readouterr()
    session.print_profile_data(n=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  File-Line-Function  | |  num calls  | |  func time  | |  tot time  |"
    rows = [line for line in lines[1:] if line]
    assert all(len(row.rpartition(")")[2].split()) == 3 for row in rows)
    assert sum("'finish'" in row for row in rows) == 2
    assert session.backend_options()["enable_profiling"] is True
    session.update_backend_options(num_activations=3)
    session.setup()
    assert machine.card(0).free.num_nsps == 14 - 3
    with pytest.raises(ValueError, match="mos cannot be changed after creation"):
        session.update_backend_options(mos=1)
    session.reset()


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Failed to open file"):
        Session(str(tmp_path / "programqpc.bin"))


PROGRAM = """
import sys
import numpy as np
import qaic
session = qaic.Session(sys.argv[1], set_size=1)
shape, kind = session.model_input_shape_dict["x"]
print(qaic.__file__)
print(session.run({"x": np.ones(shape, kind)})["doubled"].tolist())
"""


@pytest.mark.parametrize("way", ["module", "wheel"])
def test_import_qaic_in_a_program_that_knows_nothing_of_us(
    sdk: Path, tmp_path: Path, way: str
) -> None:
    library = next((sdk / "dev" / "lib").iterdir())
    place = library
    if way == "wheel":
        place = tmp_path / "site"
        with zipfile.ZipFile(library / wheel.NAME) as archive:
            archive.extractall(place)
            record = archive.read("qaic-0.0.1.dist-info/RECORD").decode()
        for line in record.splitlines()[:-1]:
            name, digest, size = line.split(",")
            data = (place / name).read_bytes()
            found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={found}", str(len(data)))
    qpc = compile_net(tmp_path, adding_up(), "-retained-state")
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(qpc)],
        env={**kept, folder.STATE_VARIABLE: str(tmp_path / "state"), "PYTHONPATH": str(place)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(place / "qaic.py"), "[[2.0, 2.0, 2.0]]"]
