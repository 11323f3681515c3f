"""`-external-quantization`: levels that AIMET exported, against its own formula in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from small_cnn import compiled, relative_error, save

from qaic_ray.emulator import compiler
from qaic_ray.emulator.container.execution import LoadedProgram


def quantized(values: Any, scale: Any, offset: Any) -> Any:
    """What AIMET's simulation makes of values: levels 0 to 255, `scale * (level + offset)`."""
    levels = np.clip(np.round(values.astype(np.float64) / scale) - offset, 0, 255)
    return ((levels + offset) * scale).astype(np.float32)


def of_range(low: float, high: float) -> tuple[float, int]:
    scale = (high - low) / 255
    return scale, round(low / scale)


class Layer:
    """y = relu(x @ w.T + b), its inputs, and a scale and an offset for each value of it."""

    def __init__(self, folder: Path) -> None:
        draw = np.random.default_rng(3)
        self.x = draw.standard_normal((64, 24)).astype(np.float32)
        self.w = (draw.standard_normal((8, 24)) * np.geomspace(0.2, 3, 8)[:, None]).astype("f")
        self.b = draw.standard_normal(8).astype(np.float32)
        truth = np.maximum(self.x @ self.w.T + self.b, 0)
        self.truth = truth
        self.of_x = of_range(float(self.x.min()), float(self.x.max()))
        self.of_y = of_range(0.0, float(truth.max()))
        self.of_w = (np.abs(self.w).max(1) / 127, np.full(8, -128))
        nodes = [
            helper.make_node("Gemm", ["x", "w", "b"], ["g"], transB=1),
            helper.make_node("Relu", ["g"], ["y"]),
        ]
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, width])
            for name, width in (("x", 24), ("y", 8))
        ]
        tensors = [numpy_helper.from_array(self.w, "w"), numpy_helper.from_array(self.b, "b")]
        graph = helper.make_graph(nodes, "layer", values[:1], values[1:], tensors)
        save(graph, folder / "layer.onnx")

    def expected(self) -> Any:
        w = quantized(self.w, *(part[:, None] for part in self.of_w))
        sums = quantized(self.x, *self.of_x) @ w.T + self.b
        return quantized(np.maximum(sums, 0), *self.of_y)

    def encodings(self, form: str) -> dict[str, Any]:
        """As AIMET writes them: the bias of 32 bits, and what is fused has none."""
        rows = {
            "x": ([self.of_x[0]], [self.of_x[1]]),
            "y": ([self.of_y[0]], [self.of_y[1]]),
            "w": (self.of_w[0].tolist(), self.of_w[1].tolist()),
        }
        if form == "1.0.0":
            made = {
                name: {
                    "name": name,
                    "bw": 8,
                    "dtype": "INT",
                    "enc_type": "PER_CHANNEL" if len(scale) > 1 else "PER_TENSOR",
                    "is_sym": name == "w",
                    "offset": offset,
                    "scale": scale,
                }
                for name, (scale, offset) in rows.items()
            }
            bias = {"name": "b", "bw": 32, "dtype": "INT", "scale": [1e-9], "offset": [0]}
            return {
                "version": form,
                "activation_encodings": [made["x"], made["y"]],
                "param_encodings": [made["w"], bias],
            }
        old = {
            name: [
                {
                    "bitwidth": 8,
                    "dtype": "int",
                    "is_symmetric": str(name == "w"),
                    "max": (255 + one[1]) * one[0],
                    "min": one[1] * one[0],
                    "offset": one[1],
                    "scale": one[0],
                }
                for one in zip(scale, offset, strict=True)
            ]
            for name, (scale, offset) in rows.items()
        }
        return {
            "version": form,
            "activation_encodings": {name: old[name] for name in "xy"},
            "param_encodings": {"w": old["w"], "b": [{"bitwidth": 32, "dtype": "int"}]},
        }


@pytest.mark.parametrize("form", ["0.6.1", "1.0.0"])
@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump], ids=["json", "yaml"])
def test_values_are_on_the_levels_of_the_file(tmp_path: Path, form: str, write: Any) -> None:
    layer = Layer(tmp_path)
    path = tmp_path / "layer.encodings"
    path.write_text(write(layer.encodings(form)))
    flags = (f"-external-quantization={path}", "-quantization-schema=symmetric")
    program, report = compiled(tmp_path, "layer", *flags)
    made = LoadedProgram(program, 1).activate().run({"x": layer.x}, {"y": (64, 8)})["y"]
    # A sum that lies between two levels may go to either, by the order of its terms.
    step = layer.of_y[0]
    assert np.abs(made - layer.expected()).max() <= 1.01 * step
    assert (np.abs(made - layer.expected()) < 1e-3 * step).mean() > 0.99
    assert 1e-4 < relative_error(made, layer.truth) < 0.02
    assert report["quantization"] == {
        "ranges_from": str(path),
        "quantized_values": 2,
        "quantized_weights": 1,
        "names_not_in_the_model": [],
    }
    assert report["options_without_effect"] == ["-quantization-schema=symmetric"]
    assert program.constants_bytes < 2 * layer.w.size


def test_what_has_no_encoding_is_that_of_fp32(tmp_path: Path) -> None:
    layer = Layer(tmp_path)
    given = layer.encodings("0.6.1")
    given["activation_encodings"].pop("y")
    given["activation_encodings"]["gone"] = given["activation_encodings"]["x"]
    given["param_encodings"] = {}
    path = tmp_path / "layer.encodings"
    path.write_text(json.dumps(given))
    program, report = compiled(tmp_path, "layer", f"-external-quantization={path}")
    made = LoadedProgram(program, 1).activate().run({"x": layer.x}, {"y": (64, 8)})["y"]
    expected = np.maximum(quantized(layer.x, *layer.of_x) @ layer.w.T + layer.b, 0)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)
    assert report["quantization"]["names_not_in_the_model"] == ["gone"]


ROW = {"bitwidth": 8, "scale": 0.1, "offset": -128}


@pytest.mark.parametrize(
    ("document", "status", "words"),
    [
        ({"NodeProfiles": []}, 255, "has none of activation_encodings, param_encodings"),
        ({"activation_encodings": "x"}, 255, "must be a mapping of names, or a list"),
        ({"activation_encodings": {"x": []}}, 255, "'x' must be an encoding, or a list"),
        ({"activation_encodings": {"x": [{**ROW, "bitwidth": 4}]}}, 255, "other encodings than"),
        ({"activation_encodings": {"x": [{**ROW, "scale": 0}]}}, 255, "'0' is no scale"),
        ({"activation_encodings": {"x": [{**ROW, "scale": "0.1"}]}}, 255, "is no scale"),
        ({"activation_encodings": {"x": [{**ROW, "offset": 3}]}}, 255, "is not in [-255, 0]"),
        ({"activation_encodings": {"x": [{**ROW, "offset": 0.5}]}}, 255, "is not in [-255, 0]"),
        ({"activation_encodings": {"x": [ROW, ROW]}}, 1, "only weights have one for each channel"),
        ({"param_encodings": {"w": [ROW] * 3}}, 1, "3 scales, which is not the number of output"),
        ({"activation_encodings": {"q": [ROW]}}, 1, "None of the 1 names of"),
        (
            {"param_encodings": [{"name": "w", "bw": 8, "enc_type": "PER_BLOCK", "scale": [1]}]},
            255,
            "other encodings than",
        ),
    ],
)
def test_a_file_that_cannot_be_obeyed_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], document: Any, status: int, words: str
) -> None:
    Layer(tmp_path)
    path = tmp_path / "layer.encodings"
    path.write_text(json.dumps(document))
    argv = [f"-m={tmp_path / 'layer.onnx'}", "-aic-hw", f"-aic-binary-dir={tmp_path / 'qpc'}"]
    assert compiler.main([*argv, f"-external-quantization={path}"]) == status
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer.encodings", "layer.onnx"]


@pytest.mark.parametrize(
    "other", ["-convert-to-quantize", "-load-profile={path}", "-dump-profile={path}"]
)
def test_it_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str) -> None:
    layer = Layer(tmp_path)
    path = tmp_path / "layer.encodings"
    path.write_text(json.dumps(layer.encodings("1.0.0")))
    argv = [f"-m={tmp_path / 'layer.onnx'}", "-aic-hw", f"-aic-binary-dir={tmp_path / 'qpc'}"]
    more = [f"-external-quantization={path}", other.format(path=path)]
    assert compiler.main([*argv, *more]) == 255
    assert "cannot be used along with" in capsys.readouterr().err
