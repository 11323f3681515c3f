"""ONNX files without their weights: equal to onnx's own reading, and never whole in memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_artifacts import HIDDEN, decoder, info, weight
from onnx import TensorProto, helper, numpy_helper
from tiny_llama import TinyLlama

from qaic_ray.check.artifacts import read_artifacts
from qaic_ray.check.checks import findings
from qaic_ray.check.facts import Target
from qaic_ray.check.reading.graphs import read_graph
from qaic_ray.check.reading.wire import KEPT_BYTES, WireError, fields, slim_model


def slim(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return onnx.ModelProto.FromString(slim_model(path))


def without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """By onnx's own classes: the same without the bytes of large tensors."""
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > KEPT_BYTES:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
    return model


def test_small_models_are_kept_as_they_are(tmp_path: Path) -> None:
    model = TinyLlama(hidden=16).onnx()
    assert all(len(t.raw_data) <= KEPT_BYTES for t in model.graph.initializer)
    assert slim(model, tmp_path) == model


def test_large_tensors_lose_their_data_alone(tmp_path: Path) -> None:
    model = TinyLlama(hidden=64, ffn=96).onnx()
    found = slim(model, tmp_path)
    assert found == without_data(model)
    assert len(found.SerializeToString()) < 60_000


def test_constants_and_functions_are_walked_too(tmp_path: Path) -> None:
    large = numpy_helper.from_array(np.ones((64, 64), np.float32))
    node = helper.make_node("Constant", [], ["c"], value=large)
    inner = helper.make_graph([node], "then", [], [info("c", [64, 64])])
    choice = helper.make_node("If", ["yes"], ["x"], then_branch=inner, else_branch=inner)
    function = helper.make_function("f", "F", [], ["c"], [node], [helper.make_opsetid("", 17)])
    model = decoder([choice], [helper.make_tensor("yes", TensorProto.BOOL, [], [True])])
    model.functions.append(function)
    found = slim(model, tmp_path)
    assert len(found.SerializeToString()) < 45_000
    assert [n.op_type for n in found.graph.node] == [n.op_type for n in model.graph.node]
    branch = found.graph.node[-1].attribute[0].g.node[0].attribute[0].t
    assert list(branch.dims) == [64, 64]
    assert not branch.raw_data


numbers = st.integers(1, 2**29 - 1)
messages = st.lists(
    st.one_of(
        st.tuples(numbers, st.just(0), st.integers(0, 2**64 - 1)),
        st.tuples(numbers, st.just(2), st.binary(max_size=300)),
        st.tuples(numbers, st.just(1), st.binary(min_size=8, max_size=8)),
        st.tuples(numbers, st.just(5), st.binary(min_size=4, max_size=4)),
    ),
    max_size=10,
)


def encoded(value: int) -> bytes:
    """A varint, by the definition: groups of 7 bits, the lowest first."""
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(g | 0x80 for g in groups[:-1]), groups[-1]])


@given(messages)
def test_fields_are_those_that_were_written(message: list[tuple[int, int, int | bytes]]) -> None:
    data = b""
    for number, kind, value in message:
        data += encoded(number << 3 | kind)
        if isinstance(value, int):
            data += encoded(value)
        else:
            data += (encoded(len(value)) if kind == 2 else b"") + value
    read = [(n, k, v if k == 0 else bytes(content)) for n, k, v, content in fields(data)]
    assert read == message


@given(st.binary(max_size=200))
def test_any_bytes_are_fields_or_an_error(data: bytes) -> None:
    try:
        list(fields(data))
    except WireError:
        return
    assert data == b"" or data[0] >> 3 > 0 or data[0] > 0x7F


def test_a_model_of_more_than_2_gib_is_named_and_not_read(tmp_path: Path) -> None:
    # The weight's bytes are a hole of the file.
    model = decoder()
    tensor = weight("big", 1, 1)
    start = model.SerializeToString()
    size = 2**31 + 4096
    body = b"".join(
        (
            b"\x08" + encoded(HIDDEN) + b"\x08" + encoded(size // HIDDEN // 4),  # dims
            b"\x10\x01",  # FLOAT
            b"\x42\x03big",
            b"\x4a" + encoded(size),  # raw_data
        )
    )
    graph_field = b"\x2a" + encoded(len(body) + size) + body
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.write(start + b"\x3a" + encoded(len(graph_field) + size) + graph_field)
        file.truncate(file.tell() + size)
    assert tensor.name == "big"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = findings(read_artifacts(path), Target())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert [one.rule for one in found] == ["onnx-too-large"]
    assert grown * 1024 < 2**28


@pytest.mark.parametrize("how", ["itself", "a circle", "a billion"])
def test_functions_that_never_end_are_an_error(how: str, tmp_path: Path) -> None:
    def function(name: str, *calls: str) -> onnx.FunctionProto:
        nodes = [helper.make_node(c, ["x"], [f"y{i}"], domain="f") for i, c in enumerate(calls)]
        return helper.make_function("f", name, ["x"], ["y0"], nodes, [helper.make_opsetid("f", 1)])

    functions = {
        "itself": [function("A", "A")],
        "a circle": [function("A", "B"), function("B", "A")],
        "a billion": [
            *(function(f"F{n}", f"F{n + 1}", f"F{n + 1}") for n in range(30)),
            function("F30", "F31"),
        ],
    }[how]
    model = decoder([helper.make_node(functions[0].name, ["logits"], ["z"], domain="f")])
    model.functions.extend(functions)
    onnx.save(model, tmp_path / "m.onnx")
    ((rule, says),) = read_graph(tmp_path / "m.onnx", "m.onnx").faults
    assert rule == "onnx-unreadable"
    assert "calls itself" in says or "operators" in says


SEVENTY_B = r"""
import re, sys
from pathlib import Path
from qaic_ray.check.artifacts import read_artifacts
from qaic_ray.check.checks import findings
from qaic_ray.check.facts import Target
from qaic_ray.limits import CARDS
found = findings(read_artifacts(Path(sys.argv[1])), Target((1, 22), CARDS["PCIe Ultra"]))
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
print([one.rule for one in found], int(peak[1]) * 1024)
"""
# Not ru_maxrss: in a new process it begins with what the one that started it has.


def test_a_70b_model_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "llama.onnx"
    llama = TinyLlama(num_layers=80)
    model = llama.onnx()
    at = 0
    for tensor in model.graph.initializer:
        if len(tensor.dims) != 2 or tensor.name.endswith("_table"):
            continue
        dims = [size * 256 if size in (32, 48, 16) else size * 2000 for size in tensor.dims]
        tensor.ClearField("raw_data")
        tensor.dims[:] = dims
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
        tensor.external_data.add(key="offset", value=str(at))
        at += 4 * dims[0] * dims[1]
    path.write_bytes(model.SerializeToString())
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(at)
    assert at > 60 * 2**30 * 2
    done = subprocess.run(
        [sys.executable, "-c", SEVENTY_B, str(path)], capture_output=True, text=True, check=True
    )
    rules, memory = done.stdout.rsplit(maxsplit=1)
    assert "dram" in rules
    assert int(memory) < 500 * 2**20
