"""Greedy token ids of the whole road, against transformers' `generate`.

Compiled without `-convert-to-fp16`, the emulated card computes in float32: its answers are
transformers' own, whatever else is in the batch. A row may differ only where the two best logits
are a tie within 1e-4, shown by transformers' own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qaic_ray.engine import steps
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.session import Session
from qaic_ray.model.checkpoint import Checkpoint, load_torch_model
from qaic_ray.option_types import Precision
from qaic_ray.sdk import Sdk

pytestmark = [pytest.mark.model, pytest.mark.slow]

NEW_TOKENS = 48
TIE = 1e-4
TokenIds = tuple[int, ...]


def generate(model: Any, prompts: Sequence[TokenIds], new_tokens: int) -> list[TokenIds]:
    """transformers' greedy answers, eight prompts of similar length at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, TokenIds] = {}
    for start in range(0, len(order), 8):
        rows = order[start : start + 8]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + list(prompts[i]) for i in rows])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False
            )
        for row, i in enumerate(rows):
            answers[i] = _until_eos(output[row, width:].tolist(), model)
    return [answers[i] for i in range(len(prompts))]


def _until_eos(ids: list[int], model: Any) -> TokenIds:
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos)
    for position, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: position + 1])
    return tuple(ids)


def answer(
    sdk: Sdk,
    qpc: Path,
    prompts: Sequence[TokenIds],
    *,
    eos_ids: Sequence[int],
    new_tokens: int = NEW_TOKENS,
    every: int = 3,
) -> list[TokenIds]:
    """Our answers: a new prompt arrives every few steps, so slots are entered at all times."""
    session = Session(sdk, qpc, [0])
    try:
        engine = Engine(session)
        arriving = [
            steps.Sequence(i, p, engine.new_token_limit(len(p), new_tokens), frozenset(eos_ids))
            for i, p in enumerate(prompts)
        ]
        done: dict[int, TokenIds] = {}
        num_steps = 0
        while arriving or engine.busy:
            if arriving and (num_steps % every == 0 or not engine.busy):
                engine.add(arriving.pop(0))
            for finished in engine.step():
                done[finished.sequence.key] = tuple(finished.sequence.output_ids)
            num_steps += 1
    finally:
        session.close()
    return [done[i] for i in range(len(prompts))]


def assert_equal_or_tie(
    ours: Sequence[TokenIds],
    theirs: Sequence[TokenIds],
    prompts: Sequence[TokenIds],
    logits_of: Callable[[TokenIds], torch.Tensor],
) -> None:
    """Every row equal; one that differs parts at a tie, and is greedy all the way after it."""
    for prompt, row, truth in zip(prompts, ours, theirs, strict=True):
        if row == truth:
            continue
        logits = logits_of(prompt + row)[len(prompt) - 1 : -1]
        best = logits.max(dim=-1).values
        chosen = logits[range(len(row)), list(row)]
        gap = (best - chosen).max().item()
        assert gap <= TIE, f"prompt of {len(prompt)} tokens: {row} is not {truth}; gap {gap:.2e}"


@pytest.fixture(scope="session")
def generated(torch_model: Any, prompts: list[TokenIds]) -> list[TokenIds]:
    return generate(torch_model, prompts, NEW_TOKENS)


@pytest.mark.parametrize("slots", [1, 4, 8])
def test_fp32_token_ids_are_those_of_generate(
    slots: int,
    emulated_sdk: Sdk,
    qpc: Callable[[Precision, int], Path],
    checkpoint: Checkpoint,
    torch_model: Any,
    prompts: list[TokenIds],
    generated: list[TokenIds],
) -> None:
    ours = answer(emulated_sdk, qpc(Precision.FP32, slots), prompts, eos_ids=checkpoint.eos_ids)

    def logits_of(ids: TokenIds) -> torch.Tensor:
        with torch.inference_mode():
            return torch_model(torch.tensor([ids])).logits[0]

    assert_equal_or_tie(ours, generated, prompts, logits_of)


class RoundedCache(DynamicCache):
    """Keys and values rounded to float16 as they enter the cache, as the custom IO has them."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().update(
            key_states.half().float(), value_states.half().float(), *args, **kwargs
        )


@pytest.fixture(scope="session")
def rounded_model(checkpoint: Checkpoint) -> Any:
    """transformers with every constant rounded to float16: weights, norms, rope tables."""
    model = load_torch_model(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    rotary = model.model.rotary_emb
    exact = rotary.forward

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = exact(*args, **kwargs)
        return cos.half().float(), sin.half().float()

    rotary.forward = forward
    return model


def test_fp16_token_ids_are_those_of_transformers_rounded_likewise(
    emulated_sdk: Sdk,
    qpc: Callable[[Precision, int], Path],
    checkpoint: Checkpoint,
    rounded_model: Any,
    prompts: list[TokenIds],
) -> None:
    chosen = prompts[:8]
    ours = answer(
        emulated_sdk,
        qpc(Precision.FP16, 4),
        chosen,
        eos_ids=checkpoint.eos_ids,
        new_tokens=24,
    )

    def logits_of(ids: TokenIds) -> torch.Tensor:
        with torch.inference_mode():
            cache = RoundedCache(config=rounded_model.config)
            return rounded_model(torch.tensor([ids]), past_key_values=cache).logits[0]

    def greedy(prompt: TokenIds) -> TokenIds:
        cache = RoundedCache(config=rounded_model.config)
        ids, output = torch.tensor([prompt]), []
        with torch.inference_mode():
            while len(output) < 24 and not set(output) & set(checkpoint.eos_ids):
                logits = rounded_model(ids, past_key_values=cache).logits
                output.append(int(logits[0, -1].argmax()))
                ids = torch.tensor([[output[-1]]])
        return tuple(output)

    assert_equal_or_tie(ours, [greedy(p) for p in chosen], chosen, logits_of)
