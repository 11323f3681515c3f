"""Files as nobody would write them: they are checked, or are an error of ours; nothing hangs."""

from __future__ import annotations

import json
import os
import random
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from made_artifacts import (
    COMMAND,
    FLOAT16,
    SHAPES,
    decoder,
    hashed,
    io_list,
    named,
    partition,
    program,
    weight_free,
)
from mutations import documents, texts
from onnx import TensorProto, helper
from tiny_llama import TinyLlama

from qaic_ray.check.artifacts import read_artifacts
from qaic_ray.check.checks import findings
from qaic_ray.check.conversions import conversions
from qaic_ray.check.facts import Target
from qaic_ray.errors import QaicRayError
from qaic_ray.limits import CARDS

FAST = 25
SLOW = int(os.environ.get("QAIC_FUZZ_EXAMPLES") or 1000)
"""Of each of the ten kinds: 250 in the fast tier, 10,000 in the slow one."""
LONGEST_S = 20
MAX_ERROR_CHARS = 1500
TARGETS = (Target(), Target((1, 14), CARDS["PCIe"]), Target((1, 22), CARDS["PCIe Ultra"]))


@contextmanager
def awake() -> Iterator[None]:
    """An error where something takes longer than anybody would wait."""

    def too_long(_: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it hangs at {frame}")

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def survived(path: Path, target: Target) -> None:
    """Check it, and convert it; what is said is one line of a sane length."""
    with awake():
        try:
            artifacts = read_artifacts(path)
        except QaicRayError as error:
            said = [str(error)]
        else:
            found = findings(artifacts, target)
            said = [part for one in found for part in (one.says, one.remedy, one.place)]
            for artifact in artifacts:
                for one in conversions(artifact, target):
                    assert one.text.encode()
    for text in said:
        assert "\n" not in text
        assert len(text) <= MAX_ERROR_CHARS, text[:300]


def changed_bytes(good: bytes, seed: int, number: int) -> Iterator[bytes]:
    """So many byte strings that differ from a good one in a few places."""
    rng = random.Random(seed)
    for _ in range(number):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            at = rng.randrange(len(data)) if data else 0
            kind = rng.randrange(5)
            if kind == 0 and data:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1 and data:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif kind == 2:
                del data[at : at + rng.randrange(1, 30)]
            elif kind == 3:
                data[at:at] = data[at : at + rng.randrange(1, 60)]
            else:
                data[at : at + 8] = rng.randbytes(8)
        yield bytes(data[: rng.randrange(1, len(data) + 1)] if rng.random() < 0.1 else data)


def _tiny() -> bytes:
    return bytes(
        TinyLlama(num_layers=1, hidden=16, vocab=8, max_positions=8).onnx().SerializeToString()
    )


def _odd_graph() -> bytes:
    """Operators whose shapes are looked at, with subgraphs and functions."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["logits"], ["y"])],
        "then",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    tensors = [
        helper.make_tensor("dims", TensorProto.INT64, [2], [-1, 8]),
        helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        helper.make_tensor("at", TensorProto.INT64, [2, 1], [0, 1]),
        helper.make_tensor("new", TensorProto.FLOAT, [2, 64], [0.0] * 128),
    ]
    nodes = [
        helper.make_node("Reshape", ["logits", "dims"], ["flat"]),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=inner, else_branch=inner),
        helper.make_node("ScatterND", ["w", "at", "new"], ["put"]),
        helper.make_node("Add", ["flat", "flat"], ["sum"]),
        helper.make_node("F", ["sum"], ["twice"], domain="f"),
        helper.make_node("Range", ["at", "at", "at"], ["range"]),
    ]
    model = decoder(nodes, tensors)
    body = [helper.make_node("Mul", ["a", "a"], ["b"])]
    opset = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("f", "F", ["a"], ["b"], body, opset))
    model.opset_import.append(helper.make_opsetid("f", 1))
    return bytes(model.SerializeToString())


def _json(good: Any, seed: int, number: int) -> Iterator[bytes]:
    for document in documents(good, seed, number // 2):
        yield json.dumps(document).encode()
    yield from texts(json.dumps(good), seed, number - number // 2)


Kind = Callable[[Path, int, int], Iterator[bytes]]

KINDS: dict[str, tuple[str, Kind]] = {
    "graph": ("model.onnx", lambda _, s, n: changed_bytes(_tiny(), s, n)),
    "odd graph": ("model.onnx", lambda _, s, n: changed_bytes(_odd_graph(), s, n)),
    "weight-free graph": (
        "model.onnx",
        lambda folder, s, n: changed_bytes(weight_free()(folder).read_bytes(), s, n),
    ),
    "shapes": (
        "specializations.json",
        lambda _, s, n: _json({"specializations": [dict(e) for e in SHAPES]}, s, n),
    ),
    "named shapes": (
        "specializations.json",
        lambda _, s, n: _json({"specializations": named(*SHAPES)}, s, n),
    ),
    "custom IO": ("custom_io.yaml", lambda _, s, n: texts(io_list(FLOAT16), s, n)),
    "MDP": ("mdp_ts_2.json", lambda _, s, n: _json(partition([(0, 14), (1, 14)]), s, n)),
    "command": (
        "hashed_compile_params.json",
        lambda _, s, n: _json(json.loads(hashed(COMMAND)), s, n),
    ),
    "script": ("qaic-compile.sh", lambda _, s, n: texts(f"set -e\n{' '.join(COMMAND)}\n", s, n)),
    "program": (
        "programqpc.bin",
        lambda folder, s, n: changed_bytes(program(folder).read_bytes(), s, n),
    ),
}


def fuzz(kind: str, folder: Path, number: int) -> None:
    name, make = KINDS[kind]
    seed = zlib.crc32(kind.encode())
    count = 0
    for data in make(folder, seed, number):
        (folder / name).write_bytes(data)
        survived(folder / name, TARGETS[count % len(TARGETS)])
        count += 1
    assert count == number


@pytest.mark.parametrize("kind", KINDS)
def test_odd_files_are_survived(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_odd_files_are_survived(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, SLOW)
