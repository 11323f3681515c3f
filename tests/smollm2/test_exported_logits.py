"""The real model's exported graph on onnxruntime: transformers' logits, and its known answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from qaic_ray.contract import IoContract
from qaic_ray.export.check.verify import VerifyReport, verify_export
from qaic_ray.export.export import export_model
from qaic_ray.export.functions import use_plain_functions
from qaic_ray.model.checkpoint import Checkpoint, read_manifest
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import ExportOptions

pytestmark = [pytest.mark.model, pytest.mark.slow]

ANSWER = (
    " \"Ethan\" and I'm a 25-year-old male. I'm a 25-year-old male "
    "who's been working as a marketing specialist"
)


def check(report: VerifyReport) -> None:
    for scenario in report.scenarios:
        assert scenario.logits < 2e-3
        assert scenario.past_keys < 2e-3
        assert scenario.past_values < 2e-3
        assert scenario.num_top1_equal == scenario.num_rows > 0


def test_continuous_export_equals_transformers(exported: Path, checkpoint: Checkpoint) -> None:
    report = verify_export(exported, checkpoint, level="full")
    assert report.layers == tuple(range(30))
    assert [s.scenario for s in report.scenarios][-1] == "slot reuse"
    check(report)


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(continuous_batching=False),
        ExportOptions(io=IoContract.CACHE_INDEX, opset=13, continuous_batching=False),
    ],
    ids=["static", "cache-index"],
)
def test_other_exports_equal_transformers(
    checkpoint: Checkpoint, tmp_path: Path, options: ExportOptions
) -> None:
    output = tmp_path / "smollm2-135m-kv"
    result = export_model(checkpoint, options, output=output, verify="quick")
    assert result.verification is not None
    check(result.verification)


def test_known_answer(exported: Path, tokenizer: Tokenizer) -> None:
    """Greedy from one slot of a batch that is otherwise padding."""
    manifest = read_manifest(exported)
    path = exported / manifest.onnx_file
    model = onnx.load(path)
    use_plain_functions(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    shape = (2, manifest.num_kv_heads, 64, manifest.head_dim)
    past: dict[str, Any] = {
        i.name: np.zeros(shape, np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_")
    }
    ids = tokenizer.encode("My name is")
    wanted = tokenizer.encode(ANSWER)
    tokens, positions = np.array([ids, [0] * 3]), np.array([range(3), [-1] * 3])
    answer: list[int] = []
    while len(answer) < len(wanted):
        feed = {"input_ids": tokens, "position_ids": positions, "batch_index": np.array([[1], [0]])}
        logits, *states = session.run(None, feed | past)
        past = dict(zip(past, states, strict=True))
        answer.append(int(logits[0, 0].argmax()))
        tokens = np.array([[answer[-1]], [0]])
        positions = np.array([[len(ids) + len(answer) - 1], [-1]])
    assert tokenizer.decode(answer) == ANSWER
