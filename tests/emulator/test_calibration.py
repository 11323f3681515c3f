"""Ranges of models that are not float32, or not in one file, against numpy and torch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
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

from qaic_ray.emulator.compiler.levels import extremes, grid_of, levels_of
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram


@pytest.fixture(scope="module")
def cnn() -> Cnn:
    return trained()


@pytest.mark.parametrize(
    "flags",
    [(), ("-quantization-schema=asymmetric",), PER_CHANNEL],
    ids=["default", "asymmetric", "per channel"],
)
def test_a_float16_cnn_keeps_its_accuracy(tmp_path: Path, cnn: Cnn, flags: tuple[str, ...]) -> None:
    write(cnn.net, tmp_path, kind=TensorProto.FLOAT16)
    listed = write_list(tmp_path, cnn.seen.astype(np.float16))
    program, report = compiled(tmp_path, "cnn", SHAPE, "-convert-to-quantize", listed, *flags)
    assert {b.dtype for b in program.bindings} == {np.dtype(np.float16)}
    truth, made = cnn.logits, logits_of(program, cnn.images.astype(np.float16))
    assert accuracy(made, cnn.labels) > accuracy(truth, cnn.labels) - 0.01
    assert 0.001 < relative_error(made, truth) < 0.05
    assert report["quantization"]["quantized_nodes"] == 5
    assert program.constants_bytes < 1.2 * NUM_WEIGHTS


def test_weights_in_a_file_of_their_own_make_the_same_program(tmp_path: Path, cnn: Cnn) -> None:
    write(cnn.net, tmp_path)
    flags = (SHAPE, "-convert-to-quantize", write_list(tmp_path, cnn.seen), *PER_CHANNEL)
    inside, _ = compiled(tmp_path, "cnn", *flags)
    model = onnx.load(tmp_path / "cnn.onnx")
    onnx.save(
        model,
        tmp_path / "cnn.onnx",
        save_as_external_data=True,
        location="cnn.onnx_data",
        size_threshold=0,
    )
    outside, _ = compiled(tmp_path, "cnn", *flags)
    images = cnn.images[:1000]
    np.testing.assert_array_equal(logits_of(inside, images), logits_of(outside, images))


def mlp(folder: Path, kind: int) -> tuple[Any, list[Any]]:
    """y = relu(x @ w0 + b0) @ w1 + c as `mlp.onnx` in an ONNX type; its inputs and its weights."""
    draw, dtype = np.random.default_rng(8), helper.tensor_dtype_to_np_dtype(kind)
    x = draw.standard_normal((32, 64)).astype(dtype)
    shapes = [(64, 48), (48,), (48, 16), ()]
    weights = [(draw.standard_normal(shape) * 0.3).astype(dtype) for shape in shapes]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["m"]),
        helper.make_node("Add", ["m", "b0"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["n"]),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weights[3], "c")),
        helper.make_node("Add", ["n", "c"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(name, kind, [32, width])
        for name, width in (("x", 64), ("y", 16))
    ]
    names = ("w0", "b0", "w1")
    tensors = [numpy_helper.from_array(w, n) for w, n in zip(weights, names, strict=False)]
    save(helper.make_graph(nodes, "mlp", values[:1], values[1:], tensors), folder / "mlp.onnx")
    x.tofile(folder / "x.raw")
    (folder / "list.txt").write_text(f"{folder / 'x.raw'}\n")
    return x.astype(np.float32), [w.astype(np.float32) for w in weights]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("external", [False, True])
def test_an_mlp_of_any_floating_type(tmp_path: Path, kind: int, external: bool) -> None:
    x, (w0, b0, w1, c) = mlp(tmp_path, kind)
    if external:
        model = onnx.load(tmp_path / "mlp.onnx")
        onnx.save(model, tmp_path / "mlp.onnx", save_as_external_data=True, size_threshold=0)
    listed = f"-input-list-file={tmp_path / 'list.txt'}"
    program, report = compiled(tmp_path, "mlp", "-convert-to-quantize", listed, "-enable-rowwise")
    assert report["quantization"]["quantized_nodes"] == 5
    dtype = program.bindings[0].dtype
    made = LoadedProgram(program, 1).activate().run({"x": x.astype(dtype)}, {"y": (32, 16)})["y"]
    truth = np.maximum(x @ w0 + b0, 0) @ w1 + c
    assert 1e-4 < relative_error(made.astype(np.float32), truth) < 0.02


@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-3])
def test_values_that_hardly_differ_have_a_range(tmp_path: Path, apart: float) -> None:
    x = np.float32([1.0, 1.0 + apart] * 8).reshape(2, 8)
    value, out = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 8]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "near", [value], [out])
    save(graph, tmp_path / "near.onnx")
    x.tofile(tmp_path / "x.raw")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'x.raw'}\n")
    listed = f"-input-list-file={tmp_path / 'list.txt'}"
    flags = (listed, "-quantization-calibration=MSE", "-num-histogram-bins=65536")
    program, _ = compiled(tmp_path, "near", "-convert-to-quantize", *flags)
    made = LoadedProgram(program, 1).activate().run({"x": x}, {"y": (2, 8)})["y"]
    np.testing.assert_allclose(made, x, rtol=1 / 255)


WHOLE = [(shape, None) for shape in ((), (5,), (3000, 7), (7, 3000))]
CHANNELS = [(shape, axis) for shape in ((3000, 7), (7, 3000), (40, 3, 3, 3)) for axis in (0, 1)]


@pytest.mark.parametrize(("shape", "axis"), WHOLE + CHANNELS)
def test_a_weight_in_pieces_has_the_levels_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], axis: int | None
) -> None:
    monkeypatch.setattr("qaic_ray.emulator.compiler.levels._PIECE", 64)
    values = np.random.default_rng(2).standard_normal(shape).astype(np.float16)
    over = None if axis is None else tuple(i for i in range(len(shape)) if i != axis)
    low, high = extremes(values, TensorProto.FLOAT16, axis)
    np.testing.assert_array_equal(low, values.min(over))
    np.testing.assert_array_equal(high, values.max(over))
    grid = grid_of(low, high, "asymmetric")
    expanded = [np.asarray(part, np.float64) for part in (grid.scale, grid.zero_point)]
    if axis is not None:
        expanded = [np.expand_dims(part, over) for part in expanded]
    whole = np.clip(np.round(values.astype(np.float64) / expanded[0]) + expanded[1], -128, 127)
    np.testing.assert_array_equal(levels_of(values, TensorProto.FLOAT16, grid, axis), whole)


WIDE, NARROW, FILLED = 40_960, 8192, 64
"""Two weights of 1.25 GiB each in float32; a few of their rows are not zero, the rest a hole."""

_COMPILE = """
    import sys, threading
    from qaic_ray.emulator import compiler

    peak = 0
    ended = threading.Event()

    def watch():
        global peak
        while not ended.wait(0.02):
            with open("/proc/self/status") as status:
                lines = [line for line in status if line.startswith("RssAnon:")]
            peak = max(peak, int(lines[0].split()[1]) >> 10)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = compiler.main(sys.argv[1:])
    ended.set()
    watcher.join()
    print("peak", peak)
    sys.exit(status)
"""


def sparse_weight(file: Path, offset: int, shape: tuple[int, int], seed: int) -> Any:
    """Fill the first rows of a weight [K, N] in a file; they are returned."""
    rows = np.random.default_rng(seed).standard_normal((FILLED, shape[1])).astype(np.float32)
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(rows.tobytes())
    return rows


@pytest.mark.slow
def test_a_model_of_more_than_2_gib_is_quantized_in_less_memory_than_it_has(
    tmp_path: Path,
) -> None:
    shapes = {"up": (NARROW, WIDE), "down": (WIDE, NARROW)}
    size = 4 * NARROW * WIDE
    file = tmp_path / "weights.bin"
    with file.open("wb") as made:
        made.truncate(2 * size)
    rows, tensors = {}, []
    for place, (name, shape) in enumerate(shapes.items()):
        rows[name] = sparse_weight(file, place * size, shape, place)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": file.name, "offset": place * size, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "down"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, NARROW]) for n in "xy")
    graph = helper.make_graph(nodes, "big", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "big.onnx")
    values = np.random.default_rng(9).standard_normal((1, NARROW)).astype(np.float32)
    values.tofile(tmp_path / "x.raw")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'x.raw'}\n")
    argv = [f"-m={tmp_path / 'big.onnx'}", "-aic-hw", f"-aic-binary-dir={tmp_path / 'qpc'}"]
    argv += ["-convert-to-quantize", f"-input-list-file={tmp_path / 'list.txt'}"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_COMPILE), *argv],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The levels take 640 MiB, a fourth of the weights: they are kept once.
    peak = int(done.stdout.rsplit("peak", 1)[1])
    assert 640 <= peak < 1100
    program = CompiledProgram.open(str(tmp_path / "qpc"))
    made = LoadedProgram(program, 2).activate().run({"x": values}, {"y": (1, NARROW)})["y"]
    hidden = np.maximum(values[:, :FILLED] @ rows["up"], 0)
    assert relative_error(made, hidden[:, :FILLED] @ rows["down"]) < 0.05
