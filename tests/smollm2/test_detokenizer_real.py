"""The real tokenizer's text, token by token, beside transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qaic_ray.model.checkpoint import Checkpoint
from qaic_ray.model.detokenizer import IncrementalText, StopFinder
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.sampling_params import SamplingParams

PROMPTS = Path(__file__).parents[2] / "jobs" / "prompts" / "english.jsonl"
pytestmark = [pytest.mark.model, pytest.mark.slow]

FOREIGN = "日本語と한국어, ไทย မြန်မာ 🙂👩‍👩‍👧 e\u0301 \ufffd العربية"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return [FOREIGN, *(json.loads(line)["prompt"] for line in lines)]


def test_every_prompt_comes_back_in_whole_characters(
    checkpoint: Checkpoint, tokenizer: Tokenizer, texts: list[str]
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(checkpoint.folder)
    for text in texts:
        ids = tokenizer.encode(text)
        incremental = IncrementalText(tokenizer)
        pushes = [incremental.push([id_]) for id_ in ids]
        assert "".join(pushes) == theirs.decode(ids, skip_special_tokens=True) == text
        assert sum(push.count("\ufffd") for push in pushes) == text.count("\ufffd")
        assert incremental.finish() == ""


def test_a_stop_string_is_found_where_the_text_has_it(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        for start in range(0, len(text) - 3, 37):
            stop = text[start : start + 3]
            reader = StopFinder(tokenizer, SamplingParams(stop=(stop,)))
            kept = reader.read(ids)
            assert reader.text == text[: text.find(stop)]
            assert kept is not None
            assert stop in tokenizer.decode(ids[:kept])
            assert stop not in tokenizer.decode(ids[: kept - 1])
