"""`network.elf`: what this SDK runs. Graphs without weights, the table of constants, the states.

The vendor's segment is machine code with what a runtime has to know in section `metadata_fb`; ours
has that section too, and one with its own name and magic in place of the code.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List, NamedTuple

from . import NETWORK, QpcError, elf
from .constants import FLOAT16, FLOAT32, KINDS, MXFP6, Constant

REFERENCE = "reference"
LOWERED = "lowered"
JOINT = "joint"

METADATA_SECTION = "metadata_fb"
PROGRAM_SECTION = "qaic_emulator"

_OURS = b"QAICEMU"
_MAGIC = b"QAICEMU5"
_LENGTH_BYTES = 8
_INPUT_KINDS = {"float32", "int64", "int32", "int16", "int8", "uint8", "bool"}


class NetworkElf(NamedTuple):
    """A compiled program but for its weights' bytes and its bindings.

    `hardware` is what it was compiled for, `states` is retained input -> output, `roundings`
    retained input -> what it is rounded to, `mxint8` the bindings whose buffers hold packed MXINT8,
    `input_kinds` the numpy dtype that an input is computed in, `graphs` serialized ONNX models by
    `REFERENCE`, `LOWERED` and `JOINT`.
    """

    apps_version: str
    hardware: str
    convert_to_fp16: bool
    mxfp6_matmul: bool
    num_devices: int
    states: Dict[str, str]
    roundings: Dict[str, str]
    mxint8: List[str]
    constants: List[Constant]
    input_kinds: Dict[str, str]
    graphs: Dict[str, bytes]


def serialize(program: NetworkElf, metadata: bytes) -> bytes:
    """The bytes of `network.elf`; `metadata` is section `metadata_fb`."""
    facts = program._asdict()
    facts["constants"] = [list(constant) for constant in program.constants]
    facts["graphs"] = [[name, len(data)] for name, data in program.graphs.items()]
    text = json.dumps(facts).encode()
    header = _MAGIC + len(text).to_bytes(_LENGTH_BYTES, "little")
    ours = b"".join([header, text, *program.graphs.values()])
    return elf.build({METADATA_SECTION: metadata, PROGRAM_SECTION: ours})


def refusal(data: bytes) -> QpcError:
    """Why a `network.elf` that has no program of this SDK's present form is not run."""
    ours = data.startswith(_OURS) or elf.find(data, PROGRAM_SECTION) is not None
    if data.startswith(elf.IDENT) and not ours:
        return QpcError(
            f"{NETWORK} is machine code of the vendor's compiler, which only a card runs; compile "
            "the model with the emulated SDK's own compiler to run it here"
        )
    return QpcError(
        f"{NETWORK} was not made by this version of the emulated SDK; compile the model again"
    )


def parse(data: bytes) -> NetworkElf:
    """Read `network.elf`.

    Raises:
        QpcError: where it was not made by this SDK, or is damaged.
    """
    ours = elf.find(data, PROGRAM_SECTION)
    if ours is None or not ours.startswith(_MAGIC):
        raise refusal(data)
    start = len(_MAGIC) + _LENGTH_BYTES
    end = start + int.from_bytes(ours[len(_MAGIC) : start], "little")
    try:
        return _program(json.loads(ours[start:end]), ours[end:])
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise QpcError(f"{NETWORK} is damaged ({error!r})") from error


def _program(facts: Dict[str, Any], blob: bytes) -> NetworkElf:
    graphs: Dict[str, bytes] = {}
    for name, size in facts["graphs"]:
        graphs[str(name)], blob = blob[: int(size)], blob[int(size) :]
    if REFERENCE not in graphs or blob:
        raise ValueError("graphs")
    kinds = {str(name): str(kind) for name, kind in facts["input_kinds"].items()}
    if not set(kinds.values()) <= _INPUT_KINDS:
        raise ValueError("input_kinds")
    return NetworkElf(
        apps_version=str(facts["apps_version"]),
        hardware=str(facts["hardware"]),
        convert_to_fp16=bool(facts["convert_to_fp16"]),
        mxfp6_matmul=bool(facts["mxfp6_matmul"]),
        num_devices=int(facts["num_devices"]),
        states={str(name): str(output) for name, output in facts["states"].items()},
        roundings={str(name): str(kind) for name, kind in facts["roundings"].items()},
        mxint8=[str(name) for name in facts["mxint8"]],
        constants=[_constant(*row) for row in facts["constants"]],
        input_kinds=kinds,
        graphs=graphs,
    )


def _constant(*row: Any) -> Constant:
    name, dims, kind, offset, size, transposed, in_panels = row
    shape = tuple(int(d) for d in dims)
    if kind not in KINDS or min(shape, default=0) < 0 or (in_panels and len(shape) < 2):
        raise ValueError(f"constant {name}")
    if bool(in_panels) != (kind == MXFP6) and kind not in (FLOAT16, FLOAT32):
        raise ValueError(f"constant {name}")
    stored = str(name), shape, str(kind), int(offset), int(size)
    return Constant(*stored, bool(transposed), bool(in_panels))
