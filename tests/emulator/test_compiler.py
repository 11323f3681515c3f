"""The compiler's command line, files, messages and what it leaves on disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from compiled import compile_tiny, write_inputs
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper
from tiny_llama import TinyLlama

from qaic_ray.emulator import aicapi, argv, compiler, configs, mxfp6
from qaic_ray.emulator.argv import ArgvError
from qaic_ray.emulator.compiler import VERSION_VARIABLE
from qaic_ray.emulator.configs import ConfigError
from qaic_ray.emulator.constants import read_constant
from qaic_ray.emulator.program import LoadedProgram, Qpc

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from qaic_ray.emulator import compiler; sys.exit(compiler.main(sys.argv[1:]))",
]


def run(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str], list[str]]:
    """Status, lines of stdout, lines of stderr."""
    status = compiler.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def test_a_compile_says_what_the_vendors_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*write_inputs(tmp_path, TinyLlama()), "-convert-to-fp16", "-mos=1", "-ols=1"]
    status, out, err = run(arguments, capsys)
    assert (status, err) == (0, [])
    assert f"Reading ONNX Model from {tmp_path / 'tiny.onnx'}" in out
    assert any(line.startswith("loading compiler from: ") for line in out)
    assert "Compile started ............... " in out
    assert "Compiling model with FP16 precision." in out
    assert out[-1] == f"Generated binary is present at {tmp_path / 'qpc'}"
    assert os.listdir(tmp_path / "qpc") == ["programqpc.bin"]
    assert [line for line in out if "no effect" in line and "-mos=1" in line]
    qpc = Qpc.open(str(tmp_path / "qpc"))
    assert (qpc.name, qpc.num_cores, qpc.num_devices) == ("tiny", 14, 1)
    assert (qpc.convert_to_fp16, qpc.mxfp6_matmul) == (True, False)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("-nonsense", "Invalid option -nonsense. Use -h, -help, or --help for list of options."),
        ("-nonsense=3", "Invalid option -nonsense=3. Use"),
        ("--retained-state", "Invalid option --retained-state. Use"),
        ("model.onnx", "Invalid option model.onnx. Use"),
        ("-aic-num-cores=17", "-aic-num-cores: must be in [1, 16]"),
        ("-aic-num-cores=0", "-aic-num-cores: must be in [1, 16]"),
        ("-aic-num-cores=many", "-aic-num-cores: must be a number"),
        ("-aic-num-cores", "-aic-num-cores requires a value"),
        ("-retained-state=maybe", "must be true or false"),
        ("-onnx-define-symbol=batch", "must be symbol,value"),
        ("-aic-pmu-recipe=Sums", "must be one of AxiRd"),
        ("-mos=1,x", "must be a number"),
        ("-aic-hw-version=ai300", "must be one of 2.0, ai100"),
        ("-network-specialization-config=/nowhere/s.json", "/nowhere/s.json"),
        ("-custom-IO-list-file=/nowhere/io.yaml", "/nowhere/io.yaml"),
        ("-mdp-load-partition-config=/nowhere/m.json", "/nowhere/m.json"),
    ],
)
def test_a_wrong_argument_is_refused_with_status_255(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, text: str
) -> None:
    status, _, err = run([*write_inputs(tmp_path, TinyLlama()), argument], capsys)
    assert status == 255
    assert text in err[0]
    assert not (tmp_path / "qpc").exists()


@pytest.mark.parametrize("flag", ["-m", "-aic-hw", "-aic-binary-dir"])
def test_a_missing_flag_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    arguments = [a for a in write_inputs(tmp_path, TinyLlama()) if a.split("=")[0] != flag]
    status, _, err = run(arguments, capsys)
    assert (status, f"Option {flag} is required" in err[0]) == (255, True)


@pytest.mark.parametrize("flag", ["-h", "-help", "--help", "--usage"])
def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    status, out, _ = run([flag], capsys)
    assert status == 0
    assert set(argv.FLAGS) <= {word for line in out for word in line.split()}


def test_named_specializations_depend_on_the_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = write_inputs(tmp_path, TinyLlama(), named=True)
    monkeypatch.setenv(VERSION_VARIABLE, "1.20")
    status, _, err = run(arguments, capsys)
    assert status == 255
    assert err == ["[json.exception.type_error.302] type must be string, but is object"]
    monkeypatch.setenv(VERSION_VARIABLE, "1.22")
    status, _, _ = run([a.replace("=2.0", "=ai100") for a in arguments], capsys)
    assert status == 0
    assert len(Qpc.open(str(tmp_path / "qpc")).allowed_shapes) == 2


@pytest.mark.parametrize(("version", "status"), [("1.17", 255), ("1.20", 255), ("1.21.6", 0)])
def test_hardware_names_depend_on_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, status: int
) -> None:
    monkeypatch.setenv(VERSION_VARIABLE, version)
    arguments = [a.replace("=2.0", "=ai100") for a in write_inputs(tmp_path, TinyLlama())]
    assert compiler.main(arguments) == status


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "json.exception.parse_error.101"),
        ("[]", "'specializations' must be a list"),
        ('{"specializations": []}', "'specializations' must be a list"),
        ('{"specializations": [{"batch_size": 1}]}', "type must be string, but is number"),
        ('{"specializations": [{"batch_size": null}]}', "type must be string, but is null"),
        ('{"specializations": [3]}', "type must be object, but is number"),
        ('{"specializations": [{"batch_size": "-1"}]}', "Invalid value '-1'"),
        ('{"specializations": [{"batch_size": "0"}]}', "Invalid value '0'"),
        ('{"specializations": [{"batch_size": "eight"}]}', "Invalid value 'eight'"),
    ],
)
def test_a_bad_specialization_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        configs.read_specializations(str(path), named=False)
    assert message in str(caught.value)


def test_a_dimension_without_a_value_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write_inputs(tmp_path, TinyLlama())
    (tmp_path / "specializations.json").write_text('{"specializations": [{"batch_size": "1"}]}')
    status, _, err = run(arguments, capsys)
    assert status == 1
    assert err[0] == "QAIC_ERROR:"
    assert "'seq_len'" in err[1]
    assert err[2] == "QAICException:Unable to AddNodesToGraphFromModel"


def test_one_specialization_has_no_list_of_allowed_shapes(tmp_path: Path) -> None:
    arguments = write_inputs(tmp_path, TinyLlama())
    entry = {"batch_size": "3", "seq_len": "1", "ctx_len": "16", "full_batch_size": "3"}
    (tmp_path / "specializations.json").write_text(json.dumps({"specializations": [entry]}))
    assert compiler.main(arguments) == 0
    qpc = Qpc.open(str(tmp_path / "qpc"))
    assert qpc.allowed_shapes == ()
    desc = aicapi.IoDesc.FromString(qpc.io_descriptor())
    assert len(desc.allowed_shapes) == 0


def test_symbols_of_the_command_line_give_dimensions_values(tmp_path: Path) -> None:
    keep = ("-network-specialization-config",)
    arguments = [a for a in write_inputs(tmp_path, TinyLlama()) if not a.startswith(keep)]
    sizes = {"seq_len": 4, "ctx_len": 16, "full_batch_size": 3}
    arguments += [f"-onnx-define-symbol={name},{size}" for name, size in sizes.items()]
    assert compiler.main([*arguments, "-batchsize=1"]) == 0
    dims = {b.name: b.dims for b in Qpc.open(str(tmp_path / "qpc")).bindings}
    assert dims["input_ids"] == (1, 4)
    assert dims["past_key.0"] == (3, 2, 16, 8)


def test_partition_file_says_devices_and_cores(tmp_path: Path) -> None:
    devices = [{"deviceId": i, "numCores": 12} for i in range(4)]
    partition = {
        "connections": [{"devices": [0, 1, 2, 3], "type": "p2p"}],
        "partitions": [{"name": "Partition0", "devices": devices}],
    }
    (tmp_path / "mdp.json").write_text(json.dumps(partition))
    qpc = compile_tiny(tmp_path, TinyLlama(), f"-mdp-load-partition-config={tmp_path / 'mdp.json'}")
    assert (qpc.num_devices, qpc.num_cores) == (4, 12)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"partitions": [{}]}',
        '{"partitions": [{"devices": [{"deviceId": 1, "numCores": 2}]}]}',
        '{"partitions": [{"devices": [{"deviceId": 0, "numCores": 0}]}]}',
        '{"partitions": [{"devices": [{"deviceId": true, "numCores": 1}]}]}',
    ],
)
def test_a_bad_partition_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mdp.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        configs.read_partition(str(path))


def test_custom_io_is_read_as_the_exporters_write_it(tmp_path: Path) -> None:
    path = tmp_path / "io.yaml"
    path.write_text(
        " - IOName: past_key.0\n   Precision: float16\n\n"
        "# values\n - IOName: 'past_value.0'\n   Precision: mxint8 # KV\n"
    )
    assert configs.read_custom_io(str(path)) == {"past_key.0": "float16", "past_value.0": "mxint8"}
    path.write_text(" - IOName: past_key.0\n   Precision: float8\n")
    with pytest.raises(ConfigError, match="float8"):
        configs.read_custom_io(str(path))
    path.write_text("past_key.0: float16\n")
    with pytest.raises(ConfigError, match="line 1"):
        configs.read_custom_io(str(path))


def test_a_folder_with_something_in_it_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write_inputs(tmp_path, TinyLlama())
    (tmp_path / "qpc").mkdir()
    assert run(arguments, capsys)[0] == 0
    before = (tmp_path / "qpc" / "programqpc.bin").read_bytes()
    status, _, err = run(arguments, capsys)
    assert status == 1
    assert "not empty; remove it first" in err[1]
    assert (tmp_path / "qpc" / "programqpc.bin").read_bytes() == before
    assert not list(tmp_path.glob(".qpc*"))


@pytest.mark.parametrize("name", ["missing.onnx", "text.onnx"])
def test_a_model_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = write_inputs(tmp_path, TinyLlama())
    (tmp_path / "text.onnx").write_text("This is no model.")
    status, _, err = run([*arguments, f"-m={tmp_path / name}"], capsys)
    assert status == 1
    assert name in err[1]
    assert not (tmp_path / "qpc").exists()


def test_an_unknown_operator_is_named_as_the_vendor_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = helper.make_node("Teleport", ["x"], ["y"], name="/model/Teleport")
    save_small(tmp_path, [node], [])
    status, _, err = run(small_argv(tmp_path), capsys)
    assert status == 1
    assert "[Operator-'/model/Teleport', opset_version-17, ir_version-8] : " in err[1]


def save_small(folder: Path, nodes: list[Any], initializers: list[Any]) -> None:
    """A graph y = f(x) over float[2, 40]."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(
        model,
        folder / "small.onnx",
        save_as_external_data=True,
        location="small.data",
        size_threshold=0,
    )


def small_argv(folder: Path, *flags: str) -> list[str]:
    where = [f"-m={folder / 'small.onnx'}", f"-aic-binary-dir={folder / 'qpc'}"]
    return [*where, "-aic-hw", "-aic-hw-version=2.0", *flags]


def constants_of(qpc: Qpc) -> dict[str, tuple[str, np.ndarray]]:
    return {
        c.name: (c.kind, read_constant(qpc.constants_segment(), c)) for c in qpc.program.constants
    }


def test_external_gemm_and_batched_weights_are_packed_along_k(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gemm = rng.standard_normal((3, 40)).astype(np.float32)
    batched = rng.standard_normal((2, 3, 50)).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "gemm"], ["a"], transB=1),
        helper.make_node("MatMul", ["a", "batched"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in (("gemm", gemm), ("batched", batched))]
    save_small(tmp_path, nodes, tensors)
    assert compiler.main(small_argv(tmp_path, "-mxfp6-matmul", "-convert-to-fp16")) == 0
    qpc = Qpc.open(str(tmp_path / "qpc"))
    stored = constants_of(qpc)
    assert {kind for kind, _ in stored.values()} == {"mxfp6"}
    gemm_rounded = mxfp6.quantize(gemm.T).T
    batched_rounded = np.stack([mxfp6.quantize(b) for b in batched])
    np.testing.assert_array_equal(stored["gemm"][1], gemm_rounded)
    np.testing.assert_array_equal(stored["batched"][1], batched_rounded)
    x = rng.standard_normal((2, 40)).astype(np.float32)
    made = LoadedProgram(qpc, 1).activate().run({"x": x}, {"y": (2, 2, 50)})["y"]
    np.testing.assert_allclose(made, (x @ gemm_rounded.T) @ batched_rounded, atol=1e-4)


def test_fp16_rounds_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = np.full((40, 3), 0.1, np.float32)
    weight[0], weight[1] = 1e-9, 70000
    save_small(
        tmp_path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [numpy_helper.from_array(weight, "w")],
    )
    status, out, _ = run(small_argv(tmp_path, "-convert-to-fp16"), capsys)
    assert status == 0
    warnings = [line for line in out if "after conversion to 16-bit" in line]
    assert len(warnings) == 2
    assert "3 values of constant 'w' will underflow" in warnings[0]
    assert "3 values of constant 'w' will overflow" in warnings[1]
    kind, stored = constants_of(Qpc.open(str(tmp_path / "qpc")))["w"]
    assert kind == "float16"
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(stored, weight.astype(np.float16).astype(np.float32))


def test_external_data_must_be_inside_of_the_models_folder_and_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = numpy_helper.from_array(np.ones((40, 3), np.float32), "w")
    save_small(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [weight])
    data = tmp_path / "small.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    status, _, err = run(small_argv(tmp_path), capsys)
    assert (status, "too short" in err[1]) == (1, True)
    data.write_bytes(whole)
    model = onnx.load(tmp_path / "small.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../small.data"
    onnx.save(model, tmp_path / "small.onnx")
    status, _, err = run(small_argv(tmp_path), capsys)
    assert (status, "outside" in err[1]) == (1, True)
    assert not (tmp_path / "qpc").exists()


def test_a_killed_compile_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    arguments = write_inputs(tmp_path, TinyLlama(vocab=150_000))
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".qpc.tmp-*/programqpc.bin")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "qpc").exists()
    assert len(list(tmp_path.glob(".qpc.tmp-*"))) == 1
    assert compiler.main(write_inputs(tmp_path, TinyLlama())) == 0
    assert not list(tmp_path.glob(".qpc.tmp-*"))


# Not ru_maxrss: that starts with what the parent had when it forked.
PEAK = """
import re, sys
from qaic_ray.emulator import compiler
status = compiler.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(status)
"""


def peak_kib(arguments: list[str]) -> int:
    done = subprocess.run(
        [*COMMAND[:2], PEAK, *arguments], check=True, capture_output=True, text=True
    )
    return int(done.stdout.splitlines()[-1])


def test_compiling_takes_less_memory_than_the_weights_have(tmp_path: Path) -> None:
    small = peak_kib([*write_inputs(tmp_path / "small", TinyLlama()), "-convert-to-fp16"])
    arguments = write_inputs(tmp_path / "large", TinyLlama(vocab=100_000, hidden=64))
    model = onnx.load(tmp_path / "large" / "tiny.onnx")
    onnx.save(
        model, tmp_path / "large" / "tiny.onnx", save_as_external_data=True, location="weights"
    )
    weights_kib = (tmp_path / "large" / "weights").stat().st_size / 1024
    assert weights_kib > 45_000
    large = peak_kib([*arguments, "-convert-to-fp16", "-mxfp6-matmul"])
    assert large - small < weights_kib


flags = st.sampled_from([*argv.FLAGS, "-x", "--m", "", "-"])
values = st.one_of(
    st.none(), st.sampled_from(["1", "true", "2.0", "a,1", "Int8", "", "=", "0"]), st.text()
)


@settings(max_examples=300)
@given(st.lists(st.tuples(flags, values), max_size=6))
def test_fuzzed_command_lines_are_parsed_or_refused(pairs: list[tuple[str, str | None]]) -> None:
    arguments = [flag if value is None else f"{flag}={value}" for flag, value in pairs]
    with contextlib.suppress(ArgvError):
        options = argv.parse(arguments)
        assert set(options.values) <= set(argv.FLAGS)


KEYS = st.sampled_from(
    ["specializations", "symbols", "name", "partitions", "devices", "deviceId", "numCores"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS | st.text(), x, max_size=3),
    max_leaves=8,
)
TEXTS = st.one_of(
    JSON.map(json.dumps),
    JSON.map(lambda x: json.dumps({"specializations": x, "partitions": x})),
    JSON.map(lambda x: json.dumps({"specializations": [x], "partitions": [x]})),
    st.text(),
    st.lists(st.sampled_from([" - IOName: a", "   Precision: float16", "  - x", "\t", "Layout:"]))
    .map("\n".join),
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=TEXTS.map(str.encode) | st.binary())
def test_fuzzed_config_files_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    for read in (
        configs.read_partition,
        configs.read_custom_io,
        lambda p: configs.read_specializations(p, named=True),
        lambda p: configs.read_specializations(p, named=False),
    ):
        with contextlib.suppress(ConfigError):
            read(str(path))
