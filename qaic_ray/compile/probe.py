"""Whether an SDK's compiler reads weights out of a checkpoint's files: tried once for each SDK.

No public text says which version does. A compiler that does not know the metadata takes such
weights for ordinary inputs and compiles, so two probes are needed: one whose file is there must
compile, and one whose file is not there must fail.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import StrictBool

from qaic_ray.compile.compiler import program_fault, run_compiler
from qaic_ray.errors import CompileError, UsageError
from qaic_ray.files.documents import checked, read_object
from qaic_ray.files.folders import cache_folder, write_whole
from qaic_ray.sdk import Sdk, compiler_digest
from qaic_ray.weight_files.spec import METADATA_KEY, WeightPlaces
from qaic_ray.weight_files.tensors import ITEM_BYTES, TensorEntry

PROBES_FOLDER = "probes"
"""Of the cache."""

_FORMAT = 1  # raised when the probes change
_SIZE = 64
_SHAPES = {"probe.weight": (_SIZE, _SIZE), "probe.bias": (_SIZE,)}
_WEIGHTS_FILE = "probe.safetensors"


@dataclass(frozen=True)
class _Answer:
    reads: StrictBool
    sdk: str
    dtypes: list[str]


def check_reads_weights(sdk: Sdk, dtypes: Iterable[str]) -> None:
    """Refuse to compile, or to export, a model that points at its weights for an SDK that cannot.

    Args:
        sdk: whose compiler is tried, where that was not done before.
        dtypes: safetensors' names of the types of the weights.

    Raises:
        UsageError: it does not read them.
        CompileError: it compiles nothing at all.
    """
    if not reads_weights(sdk, dtypes):
        raise UsageError(
            f"The compiler of the {sdk.label} reads no weights out of a checkpoint's files (it "
            "was tried with a small graph): export the model with --weights copy."
        )


def reads_weights(sdk: Sdk, dtypes: Iterable[str]) -> bool:
    """Whether the SDK compiles graphs that point at weights of these types.

    Raises:
        CompileError: it does not compile the same graph with its weights inside either.
    """
    kinds = sorted(set(dtypes))
    identity = [_FORMAT, sdk.kind, sdk.apps_version, compiler_digest(sdk), kinds]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    place = cache_folder() / PROBES_FOLDER / f"{name}.json"
    with suppress(UsageError):  # none yet, or damaged
        return checked(_Answer, read_object(place), str(place)).reads
    try:
        with tempfile.TemporaryDirectory(prefix="qaic-ray-probe-") as folder:
            reads = all(_reads(sdk, kind, Path(folder)) for kind in kinds)
    except OSError as error:
        raise CompileError(f"Cannot write {error.filename}: {error.strerror}.") from error
    with suppress(OSError):  # a cache that cannot be written: tried again the next time
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps(asdict(_Answer(reads, sdk.label, kinds))) + "\n")
    return reads


def _reads(sdk: Sdk, kind: str, folder: Path) -> bool:
    there, away = folder / f"{kind}-there", folder / f"{kind}-away"
    for place in (there, away):
        place.mkdir()
    data = _weights(kind)
    (there / _WEIGHTS_FILE).write_bytes(data)
    fault = _compile(sdk, _pointing(kind, there), there)
    if fault is not None:
        inside = folder / f"{kind}-inside"
        inside.mkdir()
        broken = _compile(sdk, _holding(kind), inside)
        if broken is not None:
            raise broken
        return False
    return _compile(sdk, _pointing(kind, away), away) is not None


def _compile(sdk: Sdk, model: Any, folder: Path) -> CompileError | None:
    """The error of a compile; None for one that made a program."""
    import onnx

    onnx.save(model, folder / "probe.onnx")
    binary_dir = folder / "qpc"
    argv = [
        *(str(sdk.compiler), "-aic-hw", f"-aic-hw-version={sdk.hw_version}"),
        *(f"-m={folder / 'probe.onnx'}", *(["-compile-only"] if sdk.compile_only else [])),
        *("-convert-to-fp16", "-aic-num-cores=1", f"-aic-binary-dir={binary_dir}"),
    ]
    try:
        run_compiler(argv, folder / "compile.log")
    except CompileError as error:
        if error.exit_code is None:  # it did not start, or did not end
            raise
        return error
    fault = program_fault(binary_dir)
    return CompileError(f"{fault}.") if fault else None


def _weights(kind: str) -> bytes:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {}
    end = 0
    for entry in _entries(kind, Path(_WEIGHTS_FILE)).values():
        start, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": kind,
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(end)


def _entries(kind: str, path: Path) -> dict[str, TensorEntry]:
    found = {}
    for name, shape in _SHAPES.items():
        size = ITEM_BYTES[kind]
        for dim in shape:
            size *= dim
        found[name] = TensorEntry(name, kind, shape, path, 0, size)
    return found


def _graph(kind: str) -> Any:
    """y = x times the transposed weight, and the bias: as exports have them, weights as inputs."""
    from onnx import TensorProto, helper

    stored = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
    weights = [helper.make_tensor_value_info(n, stored[kind], s) for n, s in _SHAPES.items()]
    row = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, _SIZE]) for n in "xy"]
    nodes, computed = [], list(_SHAPES)
    if kind != "F32":
        computed = [f"{name}/wide" for name in _SHAPES]
        nodes = [
            helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT)
            for name, wide in zip(_SHAPES, computed, strict=True)
        ]
    nodes += [
        helper.make_node("Transpose", [computed[0]], ["right"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "right"], ["product"]),
        helper.make_node("Add", ["product", computed[1]], ["y"]),
    ]
    graph = helper.make_graph(nodes, "probe", [row[0], *weights], row[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _pointing(kind: str, folder: Path) -> Any:
    model = _graph(kind)
    entries = _entries(kind, folder / _WEIGHTS_FILE)
    places = WeightPlaces("probe", folder, (_WEIGHTS_FILE,), entries)
    model.metadata_props.add(key=METADATA_KEY, value=places.metadata)
    return model


def _holding(kind: str) -> Any:
    """The same with its weights inside."""
    model = _graph(kind)
    for value in model.graph.input[1:]:
        dims = _SHAPES[value.name]
        size = _entries(kind, Path())[value.name].num_bytes
        model.graph.initializer.add(
            name=value.name,
            data_type=value.type.tensor_type.elem_type,
            dims=dims,
            raw_data=bytes(size),
        )
    del model.graph.input[1:]
    return model
