"""A tokenizer of a token a byte beside a tiny checkpoint, so that it can be asked in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qaic_ray.model.checkpoint import Checkpoint


def byte_tokenizer(*special: str) -> Tokenizer:
    """One token a byte, every text survives it; and special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: at for at, letter in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def with_byte_tokenizer(checkpoint: Checkpoint, folder: Path) -> Path:
    """A copy of a checkpoint that has such a tokenizer; its ids are below 256."""
    shutil.copytree(checkpoint.name, folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return folder
