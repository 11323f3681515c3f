"""Token selection against transformers' logits processors, in a vocabulary of full size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from qaic_ray.engine.sampler import Selector
from qaic_ray.sampling_params import SamplingParams

VOCAB = 49_152


@dataclass
class Asked:
    """A sequence as the selector sees it."""

    params: SamplingParams
    seed: int = 0
    prompt_ids: tuple[int, ...] = ()
    output_ids: list[int] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()


def logits_of(kind: str, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    if kind == "flat":
        return rng.normal(0, 1, VOCAB).astype(np.float32)
    logits = rng.normal(-18, 3, VOCAB)
    logits[rng.permutation(VOCAB)[:300]] = -rng.exponential(4, 300)
    return logits.astype(np.float32)


def probabilities(logits: Any, temperature: float, rules: dict[str, Any]) -> Any:
    """transformers' processors in vLLM's order: temperature, min_p, top_k, top_p."""
    import torch
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    # float64: the processors' own sums over a vocabulary would else decide about borders.
    scores = torch.from_numpy(logits)[None].double()
    steps: list[Any] = [TemperatureLogitsWarper(temperature)]
    if "min_p" in rules:
        steps.append(MinPLogitsWarper(rules["min_p"]))
    if "top_k" in rules:
        steps.append(TopKLogitsWarper(rules["top_k"]))
    if "top_p" in rules:
        steps.append(TopPLogitsWarper(rules["top_p"]))
    for step in steps:
        scores = step(None, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.8},
        {"min_p": 0.02, "top_k": 100, "top_p": 0.95},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_tokens_are_drawn_as_transformers_processors_weigh_them(
    kind: str, temperature: float, rules: dict[str, Any]
) -> None:
    logits = logits_of(kind, seed=1)
    expected = probabilities(logits, temperature, rules)
    rows = 16
    selector = Selector(rows)
    for slot in range(rows):
        selector.enter(slot, Asked(SamplingParams(temperature=temperature, **rules), seed=slot))
    batch = np.repeat(logits[None], rows, axis=0)
    tokens: list[int] = []
    for _ in range(60):
        tokens += selector.choose(batch, list(range(rows))).tokens
    assert (expected[tokens] > 0).all()
    # Chi-square over bins of falling probability, each expected at least 20 times.
    order = np.argsort(-expected, kind="stable")
    bins = np.empty(VOCAB, np.int64)
    bins[order] = np.floor(np.cumsum(expected[order]) * len(tokens) / 20 - 1e-9).astype(np.int64)
    wanted = np.bincount(bins, expected) * len(tokens)
    seen = np.bincount(bins[tokens], minlength=wanted.size)
    used = wanted >= 5
    chi_square = ((seen[used] - wanted[used]) ** 2 / wanted[used]).sum()
    freedom = max(int(used.sum()) - 1, 1)
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)


def test_the_repetition_penalty_is_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(3)
    for penalty in (1.2, 5.0, 0.8):
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        output: list[int] = []
        prompt = tuple(rng.integers(0, 40, 12).tolist())
        selector = Selector(1)
        selector.enter(0, Asked(SamplingParams(repetition_penalty=penalty), prompt_ids=prompt))
        for _ in range(20):
            logits = rng.normal(0, 2, (1, 40)).astype(np.float32)
            ids = torch.tensor([[*prompt, *output]])
            wanted = int(processor(ids, torch.from_numpy(logits.copy())).argmax())
            assert selector.choose(logits, [0]).tokens == [wanted]
            output.append(wanted)


def test_min_tokens_are_transformers_min_new_tokens() -> None:
    import torch
    from transformers import MinNewTokensLengthLogitsProcessor

    rng = np.random.default_rng(4)
    processor = MinNewTokensLengthLogitsProcessor(3, 5, [1, 2], device="cpu")
    asked = Asked(SamplingParams(min_tokens=5), prompt_ids=(0, 0, 0), stop_ids=frozenset({1, 2}))
    selector = Selector(1)
    selector.enter(0, asked)
    output: list[int] = []
    for _ in range(10):
        logits = rng.normal(0, 1, (1, 6)).astype(np.float32)
        logits[0, 1] = 9
        ids = torch.tensor([[0, 0, 0, *output]])
        wanted = int(processor(ids, torch.from_numpy(logits.copy())).argmax())
        assert selector.choose(logits, [0]).tokens == [wanted]
        output.append(wanted)


@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_logprobs_are_torchs_log_softmax(kind: str) -> None:
    import torch

    logits = logits_of(kind, seed=2)
    wanted = torch.log_softmax(torch.from_numpy(logits), dim=-1)
    selector = Selector(1)
    selector.enter(0, Asked(SamplingParams(temperature=0.8, top_p=0.9, logprobs=20), seed=5))
    choice = selector.choose(logits[None], [0])
    (given,) = choice.logprobs
    assert given is not None
    assert given.logprob == pytest.approx(float(wanted[choice.tokens[0]]), abs=1e-5)
    values, ids = wanted.topk(20)
    assert [token for token, _ in given.top] == ids.tolist()
    assert [value for _, value in given.top] == pytest.approx(values.tolist(), abs=1e-5)
