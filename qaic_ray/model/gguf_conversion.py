"""A GGUF file as the folder of a checkpoint: config, weights of float32 and tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qaic_ray.model.gguf_config import end_ids, family_of, read_config
from qaic_ray.model.gguf_file import read_gguf
from qaic_ray.model.gguf_tokenizer import write_tokenizer
from qaic_ray.model.gguf_weights import read_divisors, write_weights


def write_conversion(path: Path, folder: Path) -> None:
    """Convert a GGUF file, with all its parts, into an empty folder.

    Raises:
        CheckpointError: it is damaged, of an architecture that we do not run, or it holds
            something that we do not know.
    """
    gguf = read_gguf(path)
    family = family_of(gguf)
    config = read_config(gguf, read_divisors(gguf))
    # First, because it checks the vocabulary.
    write_tokenizer(gguf.keys, gguf.name, folder)
    ids = {"eos_token_id": list(end_ids(gguf)) or None}
    ids |= {"bos_token_id": gguf.keys.get("tokenizer.ggml.bos_token_id")}
    _write_json(folder / "config.json", config | ids)
    _write_json(folder / "generation_config.json", ids)
    write_weights(gguf, family, config, folder / "model.safetensors")


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n")
