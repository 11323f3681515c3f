"""Files as nobody would write them: they are checked, or are an error of ours; nothing hangs."""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import MANY, awake, changed_bytes
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
"""Of each of the ten kinds, in the fast tier; the slow one has a tenth of `MANY` of each."""
MAX_ERROR_CHARS = 1500
TARGETS = (Target(), Target((1, 14), CARDS["PCIe"]), Target((1, 22), CARDS["PCIe Ultra"]))


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
    start_s = time.perf_counter()
    seed = zlib.crc32(kind.encode())
    count = 0
    for data in make(folder, seed, number):
        (folder / name).write_bytes(data)
        survived(folder / name, TARGETS[count % len(TARGETS)])
        count += 1
    assert count == number
    took_s = time.perf_counter() - start_s
    logging.getLogger(__name__).info("check, %s: %d inputs, %.1f s", kind, count, took_s)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_files_are_survived(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, FAST)


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_odd_files_are_survived(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, MANY // 10)
