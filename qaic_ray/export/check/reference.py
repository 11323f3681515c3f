"""Runs prompts through PyTorch: the reference for an exported graph.

No other file of the export runs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray.export.tensors import FLOAT16_MAX
from qaic_ray.model.checkpoint import Checkpoint, load_torch_model

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Trace:
    """One prompt and its greedy continuation.

    `tokens` is the prompt and the tokens decoded from it but the last, `logits` [tokens, vocab]
    what follows each of them; `keys` and `values` have a row [heads, tokens, head_dim] for every
    layer.
    """

    prompt_len: int
    tokens: npt.NDArray[np.int64]
    logits: Floats
    keys: list[Floats]
    values: list[Floats]


def trace_prompts(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    num_steps: int,
    layers: Sequence[int] | None = None,
    clip: bool = False,
) -> list[Trace]:
    """Run prompts through transformers in float32.

    Args:
        checkpoint: opened with its weights.
        prompts: token ids.
        num_steps: tokens decoded after each prompt.
        layers: the layers to run, where not all.
        clip: bring the weights into the range of float16 first, as the export has done.
    """
    import torch

    model = load_torch_model(checkpoint, layers=layers)
    if clip:
        for parameter in model.parameters():
            clipped = parameter.clamp(-FLOAT16_MAX, FLOAT16_MAX)
            parameter.data = torch.where(parameter.isneginf(), parameter, clipped)
    with torch.inference_mode():
        return [_trace(model, prompt, num_steps) for prompt in prompts]


def _trace(model: Any, prompt: Sequence[int], num_steps: int) -> Trace:
    import torch

    fresh, tokens, logits = list(prompt), list(prompt), []
    cache: Any = None
    for _ in range(num_steps + 1):
        result = model(torch.tensor([fresh]), past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        logits.append(result.logits[0].numpy())
        fresh = [int(logits[-1][-1].argmax())]
        tokens += fresh
    return Trace(
        prompt_len=len(prompt),
        tokens=np.array(tokens[:-1], np.int64),
        logits=np.concatenate(logits),
        keys=[layer.keys[0].numpy() for layer in cache.layers],
        values=[layer.values[0].numpy() for layer in cache.layers],
    )
