"""Tiny random models of transformers, saved as checkpoints, and an export without onnxsim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from qaic_ray.export.export import export_model
from qaic_ray.model.checkpoint import Checkpoint, open_checkpoint

# Two thread pools that wait in a busy loop cost more than these models.
torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def write_checkpoint(
    folder: Path, kind: str = "Llama", seed: int = 0, **changes: Any
) -> Checkpoint:
    """Save a random model of a kind (`Llama`, `Qwen3`, ...) and open it.

    Every parameter is random, biases and norms too, and large enough that logits differ by several
    units: an error in any of them shows.
    """
    shard_size = changes.pop("max_shard_size", "1GB")
    config = getattr(transformers, f"{kind}Config")(**(TINY | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise / 4 if parameter.ndim == 1 else noise / 4
    model.save_pretrained(folder, max_shard_size=shard_size)
    return open_checkpoint(str(folder))


@contextmanager
def untouched(model: Any, scratch: Path) -> Iterator[Callable[[], Any]]:
    """onnxsim left out: it takes seconds, and changes nothing (`test_onnxsim_finds_nothing`)."""
    yield lambda: model


export_untouched = partial(export_model, simplifier=untouched)
