"""int8 by calibration: a small CNN of torch against itself in fp32, and layers against integers."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled import FUZZ_EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from small_cnn import (
    NUM_WEIGHTS,
    PER_CHANNEL,
    SHAPE,
    Cnn,
    accuracy,
    compiled,
    logits_of,
    relative_error,
    save,
    trained,
    write,
    write_list,
)

from qaic_ray.emulator import compiler
from qaic_ray.emulator.compiler import argv, calibration, configs
from qaic_ray.emulator.compiler.calibration import Range, bounds_of
from qaic_ray.emulator.compiler.levels import grid_of
from qaic_ray.emulator.container.execution import LoadedProgram


@pytest.fixture(scope="module")
def cnn() -> Cnn:
    return trained()


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        (("-quantization-schema=asymmetric",), 0.05),
        (("-quantization-schema=symmetric",), 0.05),
        ((), 0.05),  # symmetric_with_uint8
        (("-quantization-schema=symmetric_with_power2_scale",), 0.08),
        (PER_CHANNEL, 0.05),
        (("-quantization-calibration=Percentile", "-percentile-calibration-value=99.99"), 0.05),
        (("-quantization-calibration=MSE",), 0.05),
        (("-quantization-calibration=KLMinimization",), 0.08),
        (("-quantization-precision-bias=Int8",), 0.08),
    ],
    ids=lambda value: ",".join(f.split("=")[-1] for f in value) if isinstance(value, tuple) else "",
)
def test_a_cnn_keeps_its_accuracy_in_int8(
    tmp_path: Path, cnn: Cnn, flags: tuple[str, ...], most: float
) -> None:
    write(cnn.net, tmp_path)
    listed = write_list(tmp_path, cnn.seen)
    program, report = compiled(tmp_path, "cnn", SHAPE, "-convert-to-quantize", listed, *flags)
    truth = cnn.logits
    made = logits_of(program, cnn.images)
    in_fp32 = accuracy(truth, cnn.labels)
    assert 0.8 < in_fp32 < 0.995  # else a loss would not be seen
    assert accuracy(made, cnn.labels) > in_fp32 - 0.01
    assert 0.001 < relative_error(made, truth) < most
    assert report["quantization"]["quantized_nodes"] == 5
    assert report["quantization"]["ranges_from"] == str(tmp_path / "list.txt")
    assert report["options_without_effect"] == []
    # A byte a weight, where fp32 has four.
    assert program.constants_bytes < 1.2 * NUM_WEIGHTS


def test_one_large_filter_costs_the_others_nothing_with_scales_of_their_own(
    tmp_path: Path, cnn: Cnn
) -> None:
    net = copy.deepcopy(cnn.net)
    with torch.no_grad():
        net[0].weight[0] *= 100
        net[0].bias[0] = -1e4  # never active: the network's answers have nothing of it
        truth = net(torch.from_numpy(cnn.images)).numpy()
    write(net, tmp_path)
    flags = (SHAPE, "-convert-to-quantize", write_list(tmp_path, cnn.seen))
    errors = []
    for channels in ((), ("-enable-channelwise",)):
        program, _ = compiled(tmp_path, "cnn", *flags, *channels)
        errors.append(relative_error(logits_of(program, cnn.images), truth))
    assert errors[1] < 0.05
    assert errors[0] > 3 * errors[1]


# -- one layer against integers


def layer(folder: Path) -> tuple[Any, Any, Any]:
    """y = relu(x @ w + b) as `layer.onnx`, and a file of inputs; returns x, w and b."""
    draw = np.random.default_rng(5)
    x = draw.standard_normal((16, 40)).astype(np.float32) + 0.7
    w = (draw.standard_normal((40, 12)) * np.geomspace(0.1, 4, 12)).astype(np.float32)
    b = draw.standard_normal(12).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["g"]),
        helper.make_node("Relu", ["g"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, width])
        for name, width in (("x", 40), ("y", 12))
    ]
    tensors = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")]
    save(helper.make_graph(nodes, "layer", values[:1], values[1:], tensors), folder / "layer.onnx")
    x.tofile(folder / "x.raw")
    (folder / "list.txt").write_text(f"{folder / 'x.raw'}\n\n")
    return x, w, b


def in_integers(x: Any, w: Any, b: Any, *, asymmetric: bool, rowwise: bool) -> Any:
    """The layer in 8-bit integers and 32-bit sums, by the definition of the schemas."""
    low, high = min(float(x.min()), 0.0), float(x.max())
    if asymmetric:
        x_scale = np.float32((high - low) / 255)
        x_zero = round(-128 - low / float((high - low) / 255))
    else:
        x_scale, x_zero = np.float32(max(-low, high) / 127), 0
    x_levels = np.clip(np.round(x.astype(np.float64) / x_scale) + x_zero, -128, 127).astype(int)
    largest = np.abs(w).max(0 if rowwise else None).astype(np.float64)
    w_scale = (largest / 127).astype(np.float32)
    w_levels = np.clip(np.round(w.astype(np.float64) / w_scale), -128, 127).astype(int)
    b_scale = (x_scale * w_scale).astype(np.float32)
    sums = (x_levels - x_zero) @ w_levels + np.round(b.astype(np.float64) / b_scale).astype(int)
    return np.maximum(sums * b_scale.astype(np.float64), 0)


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_layer_is_that_of_8_bit_integers(tmp_path: Path, asymmetric: bool, rowwise: bool) -> None:
    x, w, b = layer(tmp_path)
    schema = "asymmetric" if asymmetric else "symmetric"
    flags = [
        "-convert-to-quantize",
        f"-input-list-file={tmp_path / 'list.txt'}",
        f"-quantization-schema-activations={schema}",
        "-quantization-schema-constants=symmetric",
        *(["-enable-rowwise"] if rowwise else []),
    ]
    program, _ = compiled(tmp_path, "layer", *flags)
    made = LoadedProgram(program, 1).activate().run({"x": x}, {"y": (16, 12)})["y"]
    exact = in_integers(x, w, b, asymmetric=asymmetric, rowwise=rowwise)
    # The answer is on a grid of its own, whose step its range in fp32 says.
    step = np.maximum(x @ w + b, 0).max() / (255 if asymmetric else 127)
    assert np.abs(made - exact).max() <= 0.5001 * step
    np.testing.assert_allclose(made / step, np.round(made / step), atol=2e-3)
    assert np.abs(made - np.maximum(x @ w + b, 0)).max() > 1e-3


# -- ranges and levels


SCHEMAS = ("asymmetric", "symmetric", "symmetric_with_uint8", "symmetric_with_power2_scale")
Bound = st.floats(-1e4, 1e4, width=32)


@given(st.tuples(Bound, Bound).map(sorted), st.sampled_from(SCHEMAS))
def test_levels_are_as_near_as_their_step_and_have_zero(bounds: list[float], schema: str) -> None:
    low, high = bounds
    grid = grid_of(low, high, schema)
    scale, zero = float(grid.scale), int(grid.zero_point)
    values = np.linspace(min(low, 0.0), max(high, 0.0), 97)
    back = (grid.levels(values, None).astype(np.float64) - zero) * scale
    # Asymmetric levels are shifted by less than a step, so that zero is one of them.
    slack = 1.01 if schema == "asymmetric" else 0.501
    assert np.abs(back - values).max() <= slack * scale
    assert grid.limits[0] <= zero <= grid.limits[1]
    assert grid.zero_point.dtype == (
        np.uint8 if schema == "symmetric_with_uint8" and low >= 0 else np.int8
    )
    if schema.startswith("symmetric"):
        assert zero == 0
    if schema == "symmetric_with_power2_scale":
        assert np.log2(scale) == round(np.log2(scale))


def seen_of(values: Any, bins: int = 2048) -> Range:
    counts, edges = np.histogram(values, bins)
    return Range(float(edges[0]), float(edges[-1]), tuple(counts.tolist()))


def test_calibrations_choose_the_part_of_a_range_that_their_names_say() -> None:
    values = np.random.default_rng(1).standard_normal(200_000)
    values[:20] = 40.0
    seen = seen_of(values)
    assert bounds_of(seen, "None", 100) == (seen.low, seen.high)
    assert bounds_of(seen, "Percentile", 100) == (seen.low, seen.high)
    width = (seen.high - seen.low) / 2048
    low, high = bounds_of(seen, "Percentile", 99.9)
    np.testing.assert_allclose([low, high], np.percentile(values, [0.05, 99.95]), atol=1.5 * width)

    def error(part: tuple[float, float]) -> float:
        step = (part[1] - part[0]) / 255
        levels = np.clip(np.round((values - part[0]) / step), 0, 255) * step + part[0]
        return float(((values - levels) ** 2).mean())

    best = bounds_of(seen, "MSE", 100)
    tried = [(seen.low * c, seen.high * c) for c in np.linspace(0.25, 1, 60)]
    assert error(best) <= 1.05 * min(map(error, tried))
    assert bounds_of(seen, "SQNR", 100) == best
    for method in ("KLMinimization", "KLMinimizationV2"):
        low, high = bounds_of(seen, method, 100)
        assert seen.low <= low < -0.5
        assert 0.5 < high < 0.9 * seen.high
    assert bounds_of(Range(2.0, 2.0, (5,)), "MSE", 100) == (2.0, 2.0)


# -- profiles, and what stays floating point


def test_a_profile_gives_the_program_that_its_inputs_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, _, _ = layer(tmp_path)
    listed = f"-input-list-file={tmp_path / 'list.txt'}"
    profile = tmp_path / "profile.yaml"
    # As ck-qaic's calibration calls it: no hardware, no folder, and no program.
    argv = [f"-m={tmp_path / 'layer.onnx'}", listed, f"-dump-profile={profile}"]
    assert compiler.main([*argv, "-num-histogram-bins=64", "-profiling-threads=4"]) == 0
    rows = json.loads(profile.read_text())["NodeProfiles"]
    assert [row["NodeOutputName"] for row in rows] == ["x", "y"]
    assert (rows[0]["Min"], rows[0]["Max"]) == (x.min(), x.max())
    assert (len(rows[0]["Histogram"]), sum(rows[0]["Histogram"])) == (64, x.size)
    direct, _ = compiled(tmp_path, "layer", "-convert-to-quantize", listed)
    loaded, report = compiled(tmp_path, "layer", f"-load-profile={profile}")
    assert report["quantization"]["ranges_from"] == str(profile)
    made = [LoadedProgram(p, 1).activate().run({"x": x}, {"y": (16, 12)}) for p in (direct, loaded)]
    np.testing.assert_array_equal(made[0]["y"], made[1]["y"])
    assert "random data" not in capsys.readouterr().out


def test_nodes_that_are_kept_are_those_of_fp32(tmp_path: Path) -> None:
    x, w, b = layer(tmp_path)
    listed = f"-input-list-file={tmp_path / 'list.txt'}"
    truth = np.maximum(x @ w + b, 0)
    program, report = compiled(
        tmp_path, "layer", "-convert-to-quantize", listed, "-execute-nodes-in-fp16=Gemm,Relu"
    )
    assert report["quantization"]["floating_point_nodes"] == 2
    made = LoadedProgram(program, 1).activate().run({"x": x}, {"y": (16, 12)})["y"]
    np.testing.assert_allclose(made, truth, rtol=1e-5, atol=1e-5)
    kept = tmp_path / "kept.yaml"
    # In the form of the public files: names that are numbers, and keys of other things.
    kept.write_text("FP16NodeInstanceNames: [g, 1421]\nenableFP32Bias: false\n")
    program, report = compiled(
        tmp_path, "layer", "-convert-to-quantize", listed, f"-node-precision-info={kept}"
    )
    assert report["quantization"]["quantized_nodes"] == 1
    assert report["quantization"]["names_not_in_the_model"] == ["1421"]
    made = LoadedProgram(program, 1).activate().run({"x": x}, {"y": (16, 12)})["y"]
    # Only Relu's range was rounded: half a step of 255 levels from zero to the largest.
    assert 0 < np.abs(made - truth).max() <= 2 * truth.max() / 127


def test_without_inputs_ranges_are_of_random_data_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer(tmp_path)
    flags = ("-convert-to-quantize", "-use-random-input-data=uniform")
    _, report = compiled(tmp_path, "layer", *flags)
    assert report["quantization"]["ranges_from"] == "random (uniform)"
    assert "ranges are those of random data" in capsys.readouterr().out


def test_inputs_of_several_files_and_kinds(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    table = draw.standard_normal((30, 16)).astype(np.float32)
    weight = draw.standard_normal((16, 16)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Mul", ["rows", "mask"], ["masked"]),
        helper.make_node("MatMul", ["masked", "weight"], ["scores"]),
        helper.make_node("Add", ["ids", "ids"], ["twice"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [4]),
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, [4, 1]),
        ],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [4, 16]),
            helper.make_tensor_value_info("twice", TensorProto.INT64, [4]),
        ],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")],
    )
    save(graph, tmp_path / "two.onnx")
    lines = []
    for number in range(5):
        ids, mask = draw.integers(0, 30, 4), draw.random((4, 1)).astype(np.float32)
        ids.tofile(tmp_path / f"{number}.ids")
        mask.tofile(tmp_path / f"{number}.mask")
        lines.append(f"{tmp_path / f'{number}.ids'},{tmp_path / f'{number}.mask'}")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    listed = f"-input-list-file={tmp_path / 'list.txt'}"
    program, report = compiled(tmp_path, "two", "-convert-to-quantize", listed)
    assert report["quantization"]["quantized_nodes"] == 2
    made = (
        LoadedProgram(program, 1)
        .activate()
        .run({"ids": ids, "mask": mask}, {"scores": (4, 16), "twice": (4,)})
    )
    assert relative_error(made["scores"], (table[ids] * mask) @ weight) < 0.05
    np.testing.assert_array_equal(made["twice"], 2 * ids)


@pytest.mark.parametrize(
    ("flags", "list_text", "status", "words"),
    [
        ("-convert-to-quantize -convert-to-fp16", None, 255, "cannot be used with quantization"),
        ("-convert-to-quantize -dump-profile=p", None, 255, "cannot be used along with"),
        ("-convert-to-quantize -input-list-file=/none", None, 255, "Failed to open file: /none"),
        (
            "-convert-to-quantize -node-precision-info={folder}/no.yaml",
            None,
            255,
            "has none of FP16",
        ),
        ("-load-profile=/none", None, 255, "Failed to open file: /none"),
        ("-convert-to-quantize", "\n", 255, "names no inputs"),
        (
            "-convert-to-quantize",
            "a.raw,b.raw",
            255,
            "names 2 files, and the model has 1 inputs (x)",
        ),
        ("-convert-to-quantize", "/none.raw", 255, "Failed to open file: /none.raw"),
        (
            "-convert-to-quantize",
            "{folder}/list.txt",
            255,
            "of shape [16, 40] and type float32 has",
        ),
        ("-convert-to-quantize", "a\0b.raw", 255, "Failed to open file: a?b.raw: embedded null"),
        ("-load-profile={folder}/list.txt", "text", 255, "list.txt"),
        (
            "-load-profile={folder}/list.txt",
            "---\nGlowToolsVersion: 2021-06-30\n...\n---\n- NodeOutputName: 'x:0'\n...\n",
            255,
            "is a profile of the vendor's compiler",
        ),
        ("-dump-profile={folder}", None, 255, "Failed to open file: {folder}: it is not a file"),
        ("-dump-profile={folder}/none/p", None, 255, "none/p: No such file or directory"),
        ("-dump-profile={folder}/layer.onnx/p", None, 255, "layer.onnx/p: Not a directory"),
        ("-load-profile={folder}/other.yaml", "x", 1, "no range of 'x'"),
    ],
)
def test_what_cannot_be_quantized_so_is_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    list_text: str | None,
    status: int,
    words: str,
) -> None:
    layer(tmp_path)
    calibration.write_profile(str(tmp_path / "other.yaml"), {"z": Range(0.0, 1.0)})
    (tmp_path / "no.yaml").write_text("Names: [g]\n")
    argv = flags.format(folder=tmp_path).split()
    if list_text is not None:
        (tmp_path / "list.txt").write_text(list_text.format(folder=tmp_path))
        if "-convert-to-quantize" in argv:
            argv.append(f"-input-list-file={tmp_path / 'list.txt'}")
    target = tmp_path / "qpc"
    model = [f"-m={tmp_path / 'layer.onnx'}", "-aic-hw", f"-aic-binary-dir={target}"]
    before = sorted(p.name for p in tmp_path.iterdir())
    assert compiler.main([*model, *argv]) == status
    assert words.format(folder=tmp_path) in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# -- files and command lines of anybody


Value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["NodeProfiles", "NodeOutputName", "Min", "Max", "Histogram", "x"])
            | st.sampled_from(["FP16NodeInstanceNames", "FP32NodeInstanceNames"])
            | st.sampled_from(["activation_encodings", "param_encodings", "bitwidth", "bw"])
            | st.sampled_from(["name", "dtype", "enc_type", "scale", "offset"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


READERS: tuple[Any, ...] = (
    calibration.read_profile,
    configs.read_node_precisions,
    configs.read_encodings,
)


@settings(max_examples=FUZZ_EXAMPLES)
@given(Value.map(json.dumps) | st.text(max_size=200))
def test_no_file_is_a_traceback(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in READERS:
        with suppress(configs.ConfigError):
            read(str(path))


@settings(max_examples=FUZZ_EXAMPLES)
@given(
    st.lists(
        st.builds(
            "{}{}{}".format,
            st.sampled_from([*argv.FLAGS, "-compiler-args", "--x", ""]),
            st.sampled_from(["=", "", " "]),
            st.text(max_size=12) | st.sampled_from(["-mos=1 -ols=2", "-1", "a,b", "'"]),
        ),
        max_size=4,
    )
)
def test_no_command_line_is_a_traceback(arguments: list[str]) -> None:
    with suppress(argv.ArgvError):
        options = argv.parse(arguments)
        assert set(options.without_effect) <= set(options.arguments)
