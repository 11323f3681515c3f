"""Small artifacts: good ones, and each with one thing wrong that public issues tell of.

A maker gets an empty folder and gives the path that is checked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qaic_ray.emulator.container import QpcWriter, netdesc

Maker = Callable[[Path], Path]

CTX_LEN, HEADS, WIDTH, HIDDEN = 64, 2, 32, 64
PREFILL = {"batch_size": "1", "seq_len": "8", "ctx_len": "64"}
DECODE = {"batch_size": "1", "seq_len": "1", "ctx_len": "64"}
SHAPES = (PREFILL, DECODE)
STATES = ("past_key.0", "past_value.0")
PAST = ["batch_size", HEADS, "ctx_len", WIDTH]
Dims = Sequence[int | str]


def info(name: str, dims: Dims, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, dims)


def tensor(name: str, array: Any, dtype: Any = np.float32) -> Any:
    return numpy_helper.from_array(np.asarray(array, dtype), name)


def weight(name: str, *dims: int) -> Any:
    return tensor(name, np.full(dims, 0.01))


def decoder(
    nodes: Sequence[Any] = (),
    tensors: Sequence[Any] = (),
    *,
    past: Dims = tuple(PAST),
    outputs: Sequence[Any] = (),
    inputs: Sequence[Any] = (),
    suffix: str = "_RetainedState",
    opset: int = 17,
) -> Any:
    """A graph with a KV cache and one multiplication by a weight; more nodes are put behind it."""
    values = [info("input_ids", ["batch_size", "seq_len"], TensorProto.INT64)]
    values += [info(name, past) for name in STATES]
    first = [
        helper.make_node("Gather", ["embed", "input_ids"], ["hidden"], name="embed"),
        helper.make_node("MatMul", ["hidden", "w"], ["logits"], name="lm_head"),
        *(helper.make_node("Identity", [name], [name + suffix]) for name in STATES),
    ]
    made = [info("logits", ["batch_size", "seq_len", HIDDEN])]
    made += [info(name + suffix, past) for name in STATES]
    weights = [weight("embed", 50, HIDDEN), weight("w", HIDDEN, HIDDEN)]
    graph = helper.make_graph(
        [*first, *nodes],
        "decoder",
        [*values, *inputs],
        [*made, *outputs],
        [*weights, *tensors],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.qualcomm.cloud", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def shapes_file(folder: Path, entries: Any, name: str = "specializations.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"specializations": entries}))
    return path


def text_file(name: str, text: str) -> Maker:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


def shapes(*entries: Any) -> Maker:
    """A specializations.json alone."""
    return lambda folder: shapes_file(folder, entries)


def named(*entries: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": f"S{i}", "symbols": dict(entry)} for i, entry in enumerate(entries)]


def model(*nodes: Any, tensors: Sequence[Any] = (), **how: Any) -> Maker:
    """An ONNX file alone."""

    def make(folder: Path) -> Path:
        onnx.save(decoder(nodes, tensors, **how), folder / "model.onnx")
        return folder / "model.onnx"

    return make


def io_list(precisions: Mapping[str, str]) -> str:
    return "".join(f" - IOName: {n}\n   Precision: {p}\n\n" for n, p in precisions.items())


FLOAT16 = {half: "float16" for name in STATES for half in (name, f"{name}_RetainedState")}


def folder_of(
    graph: Any = None, *, entries: Any = SHAPES, precisions: Mapping[str, str] = FLOAT16
) -> Maker:
    """Graph, specializations and custom IO as they lie beside each other."""

    def make(folder: Path) -> Path:
        onnx.save(decoder() if graph is None else graph, folder / "model.onnx")
        shapes_file(folder, list(entries))
        (folder / "custom_io.yaml").write_text(io_list(precisions))
        return folder

    return make


def partition(
    devices: Sequence[tuple[int, int]], connections: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    rows = [{"deviceId": device, "numCores": cores} for device, cores in devices]
    peers = [[device for device, _ in devices]] if connections is None else connections
    return {
        "connections": [{"devices": list(group), "type": "p2p"} for group in peers],
        "partitions": [{"name": "Partition0", "devices": rows}],
    }


def mdp(devices: Sequence[tuple[int, int]], **how: Any) -> Maker:
    return text_file("mdp_ts_2.json", json.dumps(partition(devices, **how)))


def program(folder: Path, *, cores: int = 14, constants: int = 64) -> Path:
    """A program of one input, as the container has it; returns its file."""
    network = netdesc.Network(
        "net",
        (netdesc.Io("x", 1, (1, 4), False),),
        (netdesc.Io("y", 1, (1, 4), False),),
        cores,
        1,
        (),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "programqpc.bin"
    with path.open("wb") as file:
        writer = QpcWriter(file)
        for data in (bytes(constants), b"\x7fELF", netdesc.serialize(network), b"\0\0\0\0"):
            writer.write(data)
            writer.end_segment()
        writer.finish(0)
    return path


def large_program(folder: Path, num_bytes: int) -> Path:
    """A program whose constants have so many bytes, none of them on the disk."""
    path = program(folder)
    data = bytearray(path.read_bytes())
    table = struct.unpack_from("<Q", data, 32)[0]
    # The constants are moved behind everything, where the file is a hole.
    struct.pack_into("<Q", data, table, num_bytes)
    struct.pack_into("<Q", data, table + 24, len(data))
    struct.pack_into("<Q", data, 8, len(data) + num_bytes)
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(len(data) + num_bytes)
    return path


COMMAND = (
    *("/opt/qti-aic/exec/qaic-compile", "-aic-hw", "-aic-hw-version=ai100", "-m=model.onnx"),
    *("-retained-state", "-convert-to-fp16", "-mxfp6-matmul", "-aic-num-cores=14"),
)


def hashed(words: Sequence[str], entries: Any = SHAPES) -> str:
    """QEfficient's record of a compile: sizes are numbers there."""
    sizes = [{key: int(value) for key, value in entry.items()} for entry in entries]
    return json.dumps({"command": list(words), "specializations": sizes, "mdp_ts_num_devices": 1})


def qefficient(
    words: Sequence[str] = COMMAND,
    *,
    graph: Any = None,
    entries: Any = SHAPES,
    cores: int = 14,
    with_program: bool = True,
    mdp_file: Any = None,
    written: bool = True,
) -> Maker:
    """A folder of QEfficient's cache: the model, and one compile of it."""

    def make(folder: Path) -> Path:
        export = folder / "LlamaForCausalLM" / "LlamaForCausalLM-0123456789abcdef"
        compiled = export / "qpc-fedcba9876543210"
        compiled.mkdir(parents=True)
        onnx.save(decoder() if graph is None else graph, export / "LlamaForCausalLM.onnx")
        (export / "hashed_export_params.json").write_text("{}")
        (compiled / "hashed_compile_params.json").write_text(hashed(words))
        (compiled / "qconfig.json").write_text("{}")
        (compiled / "custom_io.yaml").write_text(io_list(FLOAT16))
        if written:
            shapes_file(compiled, entries)
        if mdp_file is not None:
            (compiled / "mdp_ts_2.json").write_text(json.dumps(mdp_file))
        if with_program:
            program(compiled / "qpc", cores=cores)
        else:
            (compiled / "qpc").mkdir()
        return folder

    return make


def script(*words: str, graph: Any = None) -> Maker:
    """An artifact-only bundle: the model, the script, and what it names."""

    def make(folder: Path) -> Path:
        onnx.save(decoder() if graph is None else graph, folder / "model.onnx")
        compiled = folder / "qpc-0123456789abcdef"
        compiled.mkdir()
        line = " ".join((*words, "-aic-binary-dir=qpc"))
        (compiled / "qaic-compile.sh").write_text(f"#!/bin/bash\nset -e\n{line}\n")
        shapes_file(compiled, list(SHAPES))
        (compiled / "custom_io.yaml").write_text(io_list(FLOAT16))
        return folder

    return make


def external(change: Callable[[Path], None], *, location: str = "weights.bin") -> Maker:
    """A model whose weights lie in a file beside it, which is changed."""

    def make(folder: Path) -> Path:
        path = folder / "model.onnx"
        onnx.save(
            decoder(),
            path,
            save_as_external_data=True,
            location="weights.bin",
            size_threshold=64,
        )
        if location != "weights.bin":
            moved = onnx.load(path, load_external_data=False)
            for each in moved.graph.initializer:
                for entry in each.external_data:
                    if entry.key == "location":
                        entry.value = location
            path.write_bytes(moved.SerializeToString())
        change(folder / "weights.bin")
        return path

    return make


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def safetensors(path: Path, dims: Mapping[str, Sequence[int]]) -> None:
    """A checkpoint's file: the header, and a hole where its numbers are."""
    header, at = {}, 0
    for name, shape in dims.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def weight_free(
    *, key: str = "lm.weight", shape: Sequence[int] = (HIDDEN, HIDDEN), **document: Any
) -> Maker:
    """A model one of whose weights is an input that metadata names in a checkpoint."""

    def make(folder: Path) -> Path:
        safetensors(folder / "ckpt" / "model.safetensors", {"lm.weight": (HIDDEN, HIDDEN)})
        graph = decoder(
            [helper.make_node("MatMul", ["logits", "v"], ["more"], name="free")],
            inputs=[info("v", list(shape))],
            outputs=[info("more", ["batch_size", "seq_len", HIDDEN])],
        )
        spec = {
            "version": 5,
            "files": [{"path": "ckpt/model.safetensors", "format": "safetensors"}],
            "inputs": [{"name": "v", "location": {"file": 0, "key": key}}],
        } | document
        helper.set_model_props(graph, {"com.qti.aisw.extdata": json.dumps(spec)})
        onnx.save(graph, folder / "model.onnx")
        return folder / "model.onnx"

    return make


def huge_model(num_elements: int, **how: Any) -> Any:
    """A decoder with one more weight of so many elements, its bytes in a file that is not read."""
    graph = decoder(
        [helper.make_node("MatMul", ["hidden", "big"], ["wide"], name="huge")],
        outputs=[info("wide", ["batch_size", "seq_len", num_elements // HIDDEN])],
        **how,
    )
    big = TensorProto(
        name="big", data_type=TensorProto.FLOAT, dims=[HIDDEN, num_elements // HIDDEN]
    )
    big.data_location = TensorProto.EXTERNAL
    big.external_data.add(key="location", value="big.bin")
    graph.graph.initializer.append(big)
    return graph


def with_hole(maker: Maker, num_bytes: int) -> Maker:
    """Another maker's folder, with the file of the huge weight as a hole."""

    def make(folder: Path) -> Path:
        made = maker(folder)
        for graph in folder.rglob("*.onnx"):
            with (graph.parent / "big.bin").open("wb") as file:
                file.truncate(num_bytes)
        return made

    return make
