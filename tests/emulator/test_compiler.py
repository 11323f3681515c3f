"""The compiler's command line, files, messages and what it leaves on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from compiled import compile_tiny, write_inputs
from onnx import helper
from tiny_llama import TinyLlama

from qaic_ray.emulator import compiler
from qaic_ray.emulator.compiler import VERSION_VARIABLE, argv
from qaic_ray.emulator.container import aicapi
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram

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
    assert sorted(os.listdir(tmp_path / "qpc")) == ["compile-report.json", "programqpc.bin"]
    assert [line for line in out if "no effect" in line and "-mos=1" in line]
    qpc = CompiledProgram.open(str(tmp_path / "qpc"))
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
    assert len(CompiledProgram.open(str(tmp_path / "qpc")).allowed_shapes) == 2


@pytest.mark.parametrize(("version", "status"), [("1.17", 255), ("1.20", 255), ("1.21.6", 0)])
def test_hardware_names_depend_on_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, status: int
) -> None:
    monkeypatch.setenv(VERSION_VARIABLE, version)
    arguments = [a.replace("=2.0", "=ai100") for a in write_inputs(tmp_path, TinyLlama())]
    assert compiler.main(arguments) == status


# What public programs pass: QEfficient, the vendor's Mask-RCNN, ck-qaic, axs2qaic, ai100-profiling.
PUBLIC = [
    "-mos=-1",
    "-user-tiled",
    "-split-retained-state-io",
    "-quantization-schema=symmetric_with_uint8",
    "-aic-minimize-host-traffic",
    "-aic-op-stats",
    "-qpc-crc",
    "-version",
    "-aic-profiling-type=trace",
    "-aic-profiling-format=json",
    "-aic-profiling-out-dir=optraces",
    "-aic-profiling-num-samples=5",
    "-aic-profiling-start-iter=10",
    "-aic-compile-only-test",
    "-compiler-args=-aic-perf-metrics -aic-time-passes -aic-version -aic-ddr-to-multicast "
    "-aic-form-axis-uniform-constants -aic-userdma-producer-dma -onnx-define-symbol=spare,1",
]
OBEYED = ("-qpc-crc", "-aic-compile-only-test", "-onnx-define-symbol=spare,1")


def test_flags_of_public_programs_are_taken_and_those_without_effect_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIC_COMPILER_OPTS_UNSUPPORTED", "-debug-glow")
    status, out, err = run([*write_inputs(tmp_path, TinyLlama()), *PUBLIC], capsys)
    assert (status, err) == (0, [])
    inner = [part.removeprefix("-compiler-args=") for a in PUBLIC for part in a.split(" ")]
    expected = [a for a in inner if a not in OBEYED]
    expected.append("QAIC_COMPILER_OPTS_UNSUPPORTED=-debug-glow")
    said = [line.split()[1] for line in out if line.endswith("no effect on this emulated SDK.")]
    assert said == expected
    report = json.loads((tmp_path / "qpc" / "compile-report.json").read_text())
    assert report["options_without_effect"] == expected
    assert report["num_cores"] == 14
    assert report["hardware"] == "ai100"
    assert [entry["spare"] for entry in report["specializations"]] == [1, 1]
    assert report["quantization"] is None


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("-compiler-args=-nonsense", "Invalid option -nonsense. Use"),
        ("-compiler-args='-mos=1", "No closing quotation"),
        ("-compiler-args=-compiler-args=-mos=1", "cannot hold itself"),
        ("-compiler-args", "requires a value"),
        ("-mos=-2", "must be in [1, 16]"),
        ("-output-node-name=a,,b", "must be names, by commas"),
        ("-use-random-input-data=zeros", "must be one of gaussian, uniform"),
        ("-quantization-schema=odd", "must be one of asymmetric"),
    ],
)
def test_what_such_flags_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, text: str
) -> None:
    status, _, err = run([*write_inputs(tmp_path, TinyLlama()), argument], capsys)
    assert status == 255
    assert text in err[0]


def classifier(folder: Path) -> list[str]:
    """As TensorFlow's converter writes it: values end in `:0`, nodes have plain names."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["scores:0"], name="scores"),
        helper.make_node("Softmax", ["scores:0"], ["softmax_tensor:0"], name="softmax_tensor"),
        helper.make_node("ArgMax", ["scores:0"], ["ArgMax:0"], name="ArgMax", axis=1, keepdims=0),
    ]
    weight = np.random.default_rng(1).standard_normal((16, 8), np.float32)
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 16])],
        [
            helper.make_tensor_value_info("softmax_tensor:0", onnx.TensorProto.FLOAT, [2, 8]),
            helper.make_tensor_value_info("ArgMax:0", onnx.TensorProto.INT64, [2]),
        ],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "classifier.onnx")
    return [
        f"-m={folder / 'classifier.onnx'}",
        "-aic-hw",
        "-compile-only",
        f"-aic-binary-dir={folder / 'qpc'}",
    ]


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("ArgMax", ["ArgMax:0"]),
        ("softmax_tensor:0,ArgMax", ["ArgMax:0", "softmax_tensor:0"]),
        ("scores", ["scores:0"]),  # no output of the model
    ],
)
def test_outputs_are_those_that_are_named(tmp_path: Path, name: str, outputs: list[str]) -> None:
    assert compiler.main([*classifier(tmp_path), f"-output-node-name={name}"]) == 0
    qpc = CompiledProgram.open(str(tmp_path / "qpc"))
    assert sorted(b.name for b in qpc.bindings if not b.is_input) == outputs
    x = np.random.default_rng(2).standard_normal((2, 16), np.float32)
    made = (
        LoadedProgram(qpc, 1).activate().run({"x": x}, {b.name: b.dims for b in qpc.bindings[1:]})
    )
    model = onnx.load(tmp_path / "classifier.onnx")
    scores = helper.make_tensor_value_info("scores:0", onnx.TensorProto.FLOAT, [2, 8])
    model.graph.output.append(scores)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for output, truth in zip(outputs, session.run(outputs, {"x": x}), strict=True):
        np.testing.assert_allclose(made[output], truth, rtol=1e-5, atol=1e-6)


def test_an_output_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run([*classifier(tmp_path), "-output-node-name=Argmax"], capsys)
    assert status == 1
    assert "Output node 'Argmax' is not in the model, whose outputs are softmax_tensor:0" in err[1]


@pytest.mark.parametrize(("version", "status"), [("1.21.6", 255), ("1.22", 0)])
def test_ai200_is_hardware_of_newer_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, status: int
) -> None:
    monkeypatch.setenv(VERSION_VARIABLE, version)
    assert compiler.main([*classifier(tmp_path), "-aic-hw-version=ai200"]) == status
    if status == 0:
        assert CompiledProgram.open(str(tmp_path / "qpc")).hardware == "ai200"


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
    qpc = CompiledProgram.open(str(tmp_path / "qpc"))
    assert qpc.allowed_shapes == ()
    desc = aicapi.IoDesc.FromString(qpc.io_descriptor())
    assert len(desc.allowed_shapes) == 0


def test_symbols_of_the_command_line_give_dimensions_values(tmp_path: Path) -> None:
    keep = ("-network-specialization-config",)
    arguments = [a for a in write_inputs(tmp_path, TinyLlama()) if not a.startswith(keep)]
    sizes = {"seq_len": 4, "ctx_len": 16, "full_batch_size": 3}
    arguments += [f"-onnx-define-symbol={name},{size}" for name, size in sizes.items()]
    assert compiler.main([*arguments, "-batchsize=1"]) == 0
    dims = {b.name: b.dims for b in CompiledProgram.open(str(tmp_path / "qpc")).bindings}
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
