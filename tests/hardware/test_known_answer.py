"""On a machine with a Cloud AI 100 card and the vendor's SDK: `scripts/test -m hardware`.

Elsewhere these are skipped with the reason. They run the same road as every other test, with the
vendor's compiler, runtime and card in it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qaic_ray.compile.compiler import Variant
from qaic_ray.compile.store import BuildRequest, build
from qaic_ray.contract import Specializations
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.session import Session
from qaic_ray.engine.steps import Sequence
from qaic_ray.export.export import export_model
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.option_types import Precision
from qaic_ray.options import ExportOptions
from qaic_ray.pipeline.compile_step import open_folder
from qaic_ray.sdk import VENDOR_ROOT, has_cards, open_sdk

pytestmark = [
    pytest.mark.hardware,
    pytest.mark.skipif(
        not (VENDOR_ROOT.is_dir() and has_cards()),
        reason=f"needs a Cloud AI 100 card and the vendor's SDK at {VENDOR_ROOT}",
    ),
]

# SmolLM2-135M-Instruct's greedy continuation of "My name is" in float32.
KNOWN = ' "Ethan" and I\'m a 25-year-old male.'


def test_known_answer_comes_from_the_card(tmp_path: Path) -> None:
    sdk = open_sdk(VENDOR_ROOT)
    device = next(device for device in sdk.devices() if device.ready)
    checkpoint = open_checkpoint("smollm2-135m")
    options = ExportOptions(continuous_batching=True)
    model = export_model(checkpoint, options, output=tmp_path / "m-kv", verify="off").folder
    shapes = Specializations.build(batch_size=4, prompt_len=32, ctx_len=256, continuous=True)
    variant = Variant(open_folder(model).source, Precision.FP16, device.nsp_total, shapes)
    qpc = build(BuildRequest(variant, sdk, tmp_path / "qpc")).path
    tokenizer = load_tokenizer(checkpoint)
    session = Session(sdk, qpc, [device.qid])
    try:
        engine = Engine(session)
        row = Sequence(0, tuple(tokenizer.encode("My name is")), 24, frozenset(checkpoint.eos_ids))
        engine.add(row)
        while engine.busy:
            engine.step()
    finally:
        session.close()
    assert tokenizer.decode(row.output_ids)[: len(KNOWN)] == KNOWN
