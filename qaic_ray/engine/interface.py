"""What a QPC says of itself: bindings, shapes, which contract. Reads the runtime's IoDesc message.

Knows nothing of cards and executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray import contract
from qaic_ray.contract import IoContract, Specialization, Specializations
from qaic_ray.errors import UsageError

Array = npt.NDArray[Any]
Dims = Mapping[str, tuple[int, ...]]

# QAicApi's element types; BFLOAT16 (11) is missing from older modules.
_DTYPES: dict[str, Any] = {
    "FLOAT_TYPE": np.float32,
    "FLOAT_16_TYPE": np.float16,
    "INT8_Q_TYPE": np.int8,
    "UINT8_Q_TYPE": np.uint8,
    "INT16_Q_TYPE": np.int16,
    "INT32_Q_TYPE": np.int32,
    "INT32_I_TYPE": np.int32,
    "INT64_I_TYPE": np.int64,
    "INT8_TYPE": np.int8,
}
_BYTES: np.dtype[Any] = np.dtype(np.uint8)

# Inputs of which only the shape counts.
_LASTING = (contract.NUM_LOGITS_TO_KEEP, contract.COMP_CTX_LENGTHS)

_INPUTS = {
    contract.INPUT_IDS,
    contract.POSITION_IDS,
    contract.BATCH_INDEX,
    contract.ATTENTION_MASK,
    contract.CACHE_INDEX,
    *_LASTING,
}


@dataclass(frozen=True)
class ProgramInterface:
    """The bindings of one program, by name.

    `output` is `logits` or `next_tokens`; `output_dims` has its shape in every specialization,
    `lasting` the inputs that are the same in every execution of one.
    """

    contract: IoContract
    specializations: Specializations
    index: dict[str, int]
    dtype: dict[str, np.dtype[Any]]
    output: str
    output_dims: dict[Specialization, tuple[int, ...]]
    lasting: dict[Specialization, dict[str, Array]]

    @property
    def num_bindings(self) -> int:
        """How many positions a list of all buffers has."""
        return max(self.index.values(), default=-1) + 1

    @property
    def emits_tokens(self) -> bool:
        """Whether the output is token ids in place of logits."""
        return self.output == contract.NEXT_TOKENS


def read_interface(api: ModuleType, descriptor: bytes, qpc: Path) -> ProgramInterface:
    """Read a program's descriptor.

    Args:
        api: the SDK's QAicApi_pb2.
        descriptor: a serialized IoDesc.
        qpc: named in errors.

    Raises:
        UsageError: when the program is not a language model that this tool can run.
        SpecializationError: when its shapes do not belong together.
    """
    io = api.IoDesc()
    io.ParseFromString(descriptor)
    bindings = list(io.selected_set.bindings)
    known = {
        getattr(api, name): np.dtype(kind) for name, kind in _DTYPES.items() if hasattr(api, name)
    }
    dtype = {b.name: known.get(b.type, _BYTES) for b in bindings}
    index = {b.name: b.index for b in bindings}
    inputs = [b.name for b in bindings if b.dir == api.BUFFER_IO_TYPE_INPUT]
    # A program of one specialization has no list of them.
    entries: list[Dims] = [
        {b.name: tuple(entry.shapes[b.index].dims) for b in bindings} for entry in io.allowed_shapes
    ] or [{b.name: tuple(b.dims) for b in bindings}]
    io_contract = _contract(index, qpc)
    _refuse_unknown_inputs(inputs, qpc)
    shapes = {_specialization(dims, qpc): dims for dims in entries}
    output = contract.NEXT_TOKENS if contract.NEXT_TOKENS in index else contract.LOGITS
    lasting = [name for name in _LASTING if name in index]
    return ProgramInterface(
        contract=io_contract,
        specializations=Specializations(tuple(shapes)),
        index=index,
        dtype=dtype,
        output=output,
        output_dims={shape: dims[output] for shape, dims in shapes.items()},
        lasting={
            shape: {name: np.zeros(dims[name], dtype[name]) for name in lasting}
            for shape, dims in shapes.items()
        },
    )


def _contract(index: Mapping[str, int], qpc: Path) -> IoContract:
    needed = {contract.INPUT_IDS, contract.POSITION_IDS, contract.past_key(0)}
    missing = sorted(needed - set(index))
    if not {contract.LOGITS, contract.NEXT_TOKENS} & set(index):
        missing.append(contract.LOGITS)
    if missing:
        raise UsageError(
            f"{qpc} is not the QPC of a language model this tool runs: "
            f"it has no binding {' or '.join(missing)}."
        )
    if contract.CACHE_INDEX in index:
        return IoContract.CACHE_INDEX
    return IoContract.POSITION_IDS


def _refuse_unknown_inputs(names: Iterable[str], qpc: Path) -> None:
    unknown = [name for name in names if name not in _INPUTS and not contract.is_past(name)]
    if unknown:
        raise UsageError(
            f"{qpc} has the input {' and '.join(unknown)}, which this tool does not feed: export "
            "without what adds it."
        )


def _specialization(dims: Dims, qpc: Path) -> Specialization:
    ids = dims[contract.INPUT_IDS]
    if len(ids) != 2:
        raise UsageError(f"{qpc}: input_ids must be [batch, seq_len], not {ids}.")
    slots, _, ctx_len, _ = dims[contract.past_key(0)]
    kept, computed = dims.get(contract.NUM_LOGITS_TO_KEEP), dims.get(contract.COMP_CTX_LENGTHS)
    return Specialization(
        *ids,
        ctx_len,
        full_batch_size=slots if contract.BATCH_INDEX in dims else None,
        num_logits_to_keep=kept[0] if kept else None,
        comp_ctx_lengths=computed[0] if computed else None,
    )
