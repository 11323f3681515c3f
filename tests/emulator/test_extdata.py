"""Weights that are graph inputs and lie in a checkpoint's files: read, refused by name, fuzzed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.numpy
from compiled import compile_tiny, write_inputs
from fuzzing import counts, put_through
from mutations import documents, texts
from onnx import TensorProto, helper, numpy_helper
from tiny_llama import TinyLlama

from qaic_ray.emulator import compiler
from qaic_ray.emulator.compiler import VERSION_VARIABLE, extdata
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
NUMPY_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def save(path: Path, tensors: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, path)


def spec_of(folder: Path, names: list[str], file: str = "model.safetensors") -> dict[str, Any]:
    """What QEfficient writes for a checkpoint in `folder`, its keys called like the inputs."""
    return {
        "version": 5,
        "model_name": "QEffTiny",
        "model_id": str(folder),
        "files": [{"path": f"{folder.name}/{file}", "format": "safetensors"}],
        "inputs": [{"name": n, "location": {"file": 0, "key": n}} for n in names],
    }


def embed(model: Any, spec: Any) -> Any:
    del model.metadata_props[:]
    text = spec if isinstance(spec, str) else json.dumps(spec, separators=(",", ":"))
    model.metadata_props.add(key=extdata.METADATA_KEY, value=text)
    return model


def rows(dtype: str, *, declared: str | None = None, size: int = 40) -> Any:
    """y = (x W^T) + b: W [size, size] and b of one type, cast where that is not float32."""
    kind = ONNX_TYPES[declared or dtype]
    weights = [
        helper.make_tensor_value_info("p.weight", kind, [size, size]),
        helper.make_tensor_value_info("p.bias", kind, [size]),
    ]
    row = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, size]) for n in "xy"]
    nodes, computed = [], ["p.weight", "p.bias"]
    if kind != TensorProto.FLOAT:
        computed = ["w/wide", "b/wide"]
        nodes = [
            helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT)
            for name, wide in zip(["p.weight", "p.bias"], computed, strict=True)
        ]
    nodes += [
        helper.make_node("Transpose", [computed[0]], ["right"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "right"], ["product"]),
        helper.make_node("Add", ["product", computed[1]], ["y"]),
    ]
    graph = helper.make_graph(nodes, "rows", [row[0], *weights], row[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def weights_of(dtype: str, size: int = 40) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    kind = NUMPY_TYPES[dtype]
    return {
        "p.weight": rng.standard_normal((size, size), np.float32).astype(kind),
        "p.bias": rng.standard_normal(size, np.float32).astype(kind),
    }


def arguments(folder: Path) -> list[str]:
    return [
        f"-m={folder / 'm.onnx'}",
        "-aic-hw",
        "-aic-hw-version=2.0",
        "-compile-only",
        f"-aic-binary-dir={folder / 'qpc'}",
    ]


def compiled_rows(folder: Path, model: Any, *flags: str) -> CompiledProgram:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "m.onnx")
    assert compiler.main([*arguments(folder), *flags]) == 0
    return CompiledProgram.open(str(folder / "qpc"))


def output_of(qpc: CompiledProgram, size: int = 40) -> Any:
    x = np.random.default_rng(1).standard_normal((2, size), np.float32)
    return LoadedProgram(qpc, 1).activate().run({"x": x}, {"y": (2, size)})["y"]


@pytest.mark.parametrize("flags", [(), ("-convert-to-fp16",), ("-mxfp6-matmul",)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_of_a_checkpoint_compute_as_those_of_the_graph(
    tmp_path: Path, dtype: str, flags: tuple[str, ...]
) -> None:
    """The same program as that of a graph which holds float32 copies of the same values."""
    weights = weights_of(dtype)
    save(tmp_path / "checkpoint" / "model.safetensors", weights)
    pointing = embed(rows(dtype), spec_of(tmp_path / "checkpoint", list(weights)))
    pointed = compiled_rows(tmp_path / "pointing", pointing, *flags)
    holding = rows("float32")
    del holding.graph.input[1:]
    for name, array in weights.items():
        holding.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    held = compiled_rows(tmp_path / "holding", holding, *flags)
    assert [b.name for b in pointed.bindings] == [b.name for b in held.bindings] == ["x", "y"]
    assert pointed.constants_bytes == held.constants_bytes
    result = output_of(pointed)
    assert np.array_equal(result, output_of(held))
    if not flags:
        x = np.random.default_rng(1).standard_normal((2, 40), np.float32)
        wide = {name: array.astype(np.float64) for name, array in weights.items()}
        assert np.allclose(result, x @ wide["p.weight"].T + wide["p.bias"], atol=1e-4)
    report = json.loads((tmp_path / "pointing" / "qpc" / "compile-report.json").read_text())
    assert report["external_weights"] == [str(tmp_path / "checkpoint" / "model.safetensors")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_input_may_have_a_half_in_its_file(tmp_path: Path, dtype: str) -> None:
    weights = weights_of(dtype)
    save(tmp_path / "c" / "model.safetensors", weights)
    model = embed(rows(dtype, declared="float32"), spec_of(tmp_path / "c", list(weights)))
    wide = compiled_rows(tmp_path / "wide", model)
    same = compiled_rows(tmp_path / "same", embed(rows(dtype), spec_of(tmp_path / "c", [*weights])))
    assert np.array_equal(output_of(wide), output_of(same))


def test_a_float16_graph_rounds_the_weights_of_a_float32_checkpoint(tmp_path: Path) -> None:
    weights = weights_of("float32")
    save(tmp_path / "c" / "model.safetensors", weights)
    model = embed(rows("float32"), spec_of(tmp_path / "c", list(weights)))
    nodes = [
        helper.make_node("Cast", ["p.weight"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["half"], ["turned"], perm=[1, 0]),
        helper.make_node("Cast", ["x"], ["x/half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x/half", "turned"], ["product/half"]),
        helper.make_node("Cast", ["product/half"], ["product"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["product", "p.bias"], ["y"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    result = output_of(compiled_rows(tmp_path, model))
    x = np.random.default_rng(1).standard_normal((2, 40), np.float32)
    rounded = weights["p.weight"].astype(np.float16).astype(np.float64)
    assert np.allclose(result, x @ rounded.T + weights["p.bias"], atol=1e-5)
    assert not np.allclose(result, x @ weights["p.weight"].T + weights["p.bias"], atol=1e-5)


def test_a_model_with_its_cache_and_two_inputs_of_one_tensor(tmp_path: Path) -> None:
    """The tiny Llama with every weight in two files, a tied one among them, steps as ever."""
    llama = TinyLlama()
    llama.weights["lm_head"] = np.ascontiguousarray(llama.weights["embed"].T)
    held = compile_tiny(tmp_path / "held", llama)
    arguments = write_inputs(tmp_path / "pointing", llama)
    model = onnx.load(tmp_path / "pointing" / "tiny.onnx")
    names = [n for n in llama.weights if n not in ("cos_table", "sin_table", "lm_head")]
    files = {n: ("a.safetensors", "b.safetensors")[i % 2] for i, n in enumerate(names)}
    for file in ("a.safetensors", "b.safetensors"):
        chosen = {f"model.{n}": llama.weights[n] for n in names if files[n] == file}
        save(tmp_path / "c" / file, chosen)
    spec = spec_of(tmp_path / "c", [], "a.safetensors")
    spec["files"].append({"path": "c/b.safetensors", "format": "safetensors"})
    for name in [*names, "lm_head"]:
        key = "embed" if name == "lm_head" else name
        place = {"file": int(files[key] == "b.safetensors"), "key": f"model.{key}"}
        spec["inputs"].append({"name": name, "location": place})
    kept = [t for t in model.graph.initializer if t.name not in (*names, "lm_head")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name in names:
        shape = llama.weights[name].shape
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    shape = llama.weights["embed"].shape
    model.graph.input.append(helper.make_tensor_value_info("lm_head", TensorProto.FLOAT, shape))
    turn = helper.make_node("Transpose", ["lm_head"], ["lm_head/turned"], perm=[1, 0])
    last = next(n for n in model.graph.node if "lm_head" in n.input)
    last.input[1] = "lm_head/turned"
    nodes = [turn, *model.graph.node]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    onnx.save(embed(model, spec), tmp_path / "pointing" / "tiny.onnx")
    assert compiler.main(arguments) == 0
    pointed = CompiledProgram.open(str(tmp_path / "pointing" / "qpc"))
    assert [b.name for b in pointed.bindings] == [b.name for b in held.bindings]
    ids = np.array([[5, 6, 7, 8]])
    feed = {"input_ids": ids, "position_ids": np.arange(4)[None], "batch_index": np.array([[1]])}
    results = []
    for qpc in (held, pointed):
        program = LoadedProgram(qpc, 1)
        assert program.step is not None
        assert qpc.constants_bytes == held.constants_bytes
        made = program.activate().run(feed, {"logits": (1, 1, llama.vocab)})
        results.append(made["logits"])
    assert np.array_equal(*results)


def test_an_older_compiler_takes_the_weights_for_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VERSION_VARIABLE, "1.21.6")
    model = embed(rows("float32"), spec_of(tmp_path / "nowhere", ["p.weight", "p.bias"]))
    qpc = compiled_rows(tmp_path, model)
    assert [b.name for b in qpc.bindings] == ["x", "p.weight", "p.bias", "y"]


Change = Callable[[dict[str, Any], Any], None]


def entry(spec: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = spec["inputs"][index]
    return found


REFUSED: dict[str, tuple[Change, str]] = {
    "file missing": (
        lambda s, m: s["files"][0].update(path="c/other.safetensors"),
        "External data of 'p.weight' is not there",
    ),
    "key missing": (lambda s, m: entry(s)["location"].update(key="q"), "has no 'q'"),
    "shape differs": (
        lambda s, m: entry(s)["location"].update(key="p.bias"),
        "External data of 'p.weight' has the shape [40]",
    ),
    "type differs": (
        lambda s, m: entry(s, 1)["location"].update(key="ints"),
        "External data of 'p.bias' is 'I64'",
    ),
    "no graph input": (
        lambda s, m: entry(s).update(name="p.wait"),
        "External data of 'p.wait': the graph has no such input",
    ),
    "no entry": (lambda s, m: s["inputs"].pop(0), "The graph input 'p.weight' is a weight"),
    "an entry without a place": (
        lambda s, m: entry(s).update(location=None),
        "The graph input 'p.weight' is a weight",
    ),
    "twice": (lambda s, m: s["inputs"].append(entry(s)), "has an entry of 'p.weight' twice"),
    "version": (lambda s, m: s.update(version=8), "has the version 8; this compiler reads 5, 6, 7"),
    "a version that is a text": (lambda s, m: s.update(version="5"), "has the version '5'"),
    "format": (lambda s, m: s["files"][0].update(format="gguf"), "format 'gguf'"),
    "no such file": (lambda s, m: entry(s)["location"].update(file=3), "has the file 3"),
    "leads out": (
        lambda s, m: s["files"][0].update(path="c/../../x.safetensors"),
        "which leaves its folder",
    ),
    "outside": (
        lambda s, m: s["files"][0].update(path="/usr/share/x.safetensors"),
        "lies outside of the folders",
    ),
    "quantized, version 7": (
        lambda s, m: (s.update(version=7), entry(s).update(role="mxfp6_weight")),
        "External data of 'p.weight' is quantized already ('mxfp6_weight')",
    ),
    "quantized, version 6": (
        lambda s, m: (s.update(version=6), entry(s).update(quantization={"format": "mxfp6_e2m3"})),
        "External data of 'p.weight' is quantized already",
    ),
    "no fixed shape": (
        lambda s, m: (
            m.graph.input[1]
            .type.tensor_type.shape.dim[0]
            .CopyFrom(onnx.TensorShapeProto.Dimension(dim_param="n"))
        ),
        "has no fixed shape",
    ),
    "twice in the metadata": (
        lambda s, m: m.metadata_props.add(key=extdata.METADATA_KEY, value="{}"),
        "has the metadata com.qti.aisw.extdata 2 times",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, text = REFUSED[name]
    weights = weights_of("float32") | {"ints": np.zeros(40, np.int64)}
    save(tmp_path / "c" / "model.safetensors", weights)
    model = rows("float32")
    spec = spec_of(tmp_path / "c", ["p.weight", "p.bias"])
    change(spec, model)
    doubled = [entry.value for entry in model.metadata_props]
    embed(model, spec)
    for value in doubled:
        model.metadata_props.add(key=extdata.METADATA_KEY, value=value)
    onnx.save(model, tmp_path / "m.onnx")
    assert compiler.main(arguments(tmp_path)) == 1
    said = capsys.readouterr().err
    assert text in said
    assert not (tmp_path / "qpc").exists()


def test_files_are_looked_for_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable's folder, the spec's, the model's (by a link, too), and the checkpoint's."""
    names = ["p.weight", "p.bias"]
    places = {n: tmp_path / n for n in ("variable", "root", "beside", "own")}
    for number, place in enumerate(places.values()):
        folder = place / "real" if place.name == "beside" else place / "c"
        save(
            folder / "model.safetensors", {n: a + number for n, a in weights_of("float32").items()}
        )
    (places["beside"] / "c").symlink_to(places["beside"] / "real")
    spec = spec_of(places["own"] / "c", names)
    spec["external_data_root"] = str(places["root"])
    monkeypatch.setenv(extdata.ROOT_VARIABLE, str(places["variable"]))
    found = []
    for number, gone in enumerate([None, "variable", "root", "beside"]):
        if gone == "beside":
            (places["beside"] / "c").unlink()
        elif gone is not None:
            (places[gone] / "c" / "model.safetensors").unlink()
        model = embed(rows("float32"), spec)
        compiled = extdata.attach(model, str(places["beside"]))
        values = compiled["p.bias"].open("p.bias", TensorProto.FLOAT)
        found.append(float(values[0] - weights_of("float32")["p.bias"][0]) == pytest.approx(number))
    assert found == [True] * 4


def test_the_older_forms_of_the_spec_are_read(tmp_path: Path) -> None:
    weights = weights_of("float32")
    save(tmp_path / "c" / "model.safetensors", weights)
    spec = spec_of(tmp_path / "c", list(weights))
    del spec["version"]
    spec["checkpoint_files"] = [spec.pop("files")[0]["path"]]
    entry(spec)["location"]["type"] = "safetensors"
    entry(spec, 1)["location"]["file"] = str(tmp_path / "c" / "model.safetensors")
    spec["inputs"].append({"name": "inv_freq", "location": None})
    found = extdata.attach(embed(rows("float32"), spec), str(tmp_path))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "p.weight": (40, 40),
        "p.bias": (40,),
    }


@pytest.mark.parametrize("kind", ["pipe", "folder", "cut", "short"])
def test_a_file_that_is_none_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c" / "model.safetensors"
    save(path, weights_of("float32"))
    data = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(data[:-1] if kind == "cut" else data[:9])
    spec = spec_of(tmp_path / "c", ["p.weight", "p.bias"])
    with pytest.raises(extdata.ExternalDataError, match=r"model\.safetensors"):
        extdata.attach(embed(rows("float32"), spec), str(tmp_path))


def test_a_file_that_shrank_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "c" / "model.safetensors"
    save(path, weights_of("float32"))
    model = embed(rows("float32"), spec_of(tmp_path / "c", ["p.weight", "p.bias"]))
    found = extdata.attach(model, str(tmp_path))
    os.truncate(path, path.stat().st_size - 4)
    last = max(found.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(extdata.ExternalDataError, match="cannot be read"):
        last.open("p", TensorProto.FLOAT)


def odd_specs(folder: Path, seed: int, number: int) -> Iterator[Any]:
    """Models with odd specs, as values and as damaged texts."""
    spec = spec_of(folder / "c", ["p.weight", "p.bias"]) | {"external_data_root": str(folder)}
    plain = rows("float32").SerializeToString()
    for text in of_json(spec, seed, number):
        model = onnx.ModelProto.FromString(plain)
        # protobuf takes no half of a surrogate pair
        value = text.decode("utf-8", "replace").encode("utf-8", "replace").decode()
        model.metadata_props.add(key=extdata.METADATA_KEY, value=value)
        yield model


def of_json(good: Any, seed: int, number: int) -> Iterator[bytes]:
    yield from (json.dumps(value).encode() for value in documents(good, seed, number // 2))
    yield from texts(json.dumps(good), seed, number - number // 2)


@pytest.mark.parametrize("number", counts())
def test_odd_metadata_is_read_or_refused_in_a_line(tmp_path: Path, number: int) -> None:
    save(tmp_path / "c" / "model.safetensors", weights_of("float32"))
    found = put_through(
        "extdata of the compiler",
        odd_specs(tmp_path, number, number),
        lambda model: extdata.attach(model, str(tmp_path)),
        (extdata.ExternalDataError,),
    )
    assert sum(found) == number
    assert 0 < found.read < number


@pytest.mark.parametrize("number", counts(few=1000))
def test_odd_headers_of_the_compiler_are_read_or_refused_in_a_line(number: int) -> None:
    """What is read lies inside of the file, behind the header."""
    good = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    }
    rng = random.Random(number)

    def read(data: bytes) -> None:
        size = 8 + len(data) + rng.choice((34, 34, 34, 0, 33, 10**6))
        for tensor in extdata.parse_header(data, size, "model.safetensors").values():
            assert 8 + len(data) <= tensor.offset <= tensor.offset + tensor.num_bytes <= size

    found = put_through(
        "safetensors headers of the compiler",
        of_json(good, number, number),
        read,
        (extdata.ExternalDataError,),
    )
    assert sum(found) == number
    assert 0 < found.read < number
