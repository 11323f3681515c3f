"""Checkpoints: finds a model's files by name, checks that they are safe and of a kind we run.

The only reader of transformers; importing this module loads neither it nor torch. Knows nothing
of ONNX.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaic_ray.documents import read_object
from qaic_ray.errors import CheckpointError
from qaic_ray.folders import cache_folder
from qaic_ray.model.chat import ChatTemplate
from qaic_ray.model.config_fields import Fields
from qaic_ray.model.gguf_file import model_name
from qaic_ray.model.sources import (
    NAMED_MODELS,
    convert_gguf,
    fetch_hub,
    fetch_named,
)
from qaic_ray.model.tokenizer import Tokenizer, open_chat_template, open_tokenizer
from qaic_ray.model.tokenizer_files import eos_token_ids, has_vocabulary, loaded_tokenizer
from qaic_ray.model.weight_files import check_folder, find_weights

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GraniteForCausalLM": "granite",
}
"""Classes of transformers, and the `model_type` of each."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files on this machine.

    `name` is what the user wrote, `base` the name that exported folders take from it, `config` the
    model's own `config.json`. `weight_files` is empty when opened with `weights=False`.
    """

    name: str
    folder: Path
    base: str
    config: Mapping[str, Any]
    eos_ids: tuple[int, ...]
    weight_files: tuple[Path, ...]
    trust_remote_code: bool = False


def open_checkpoint(
    name: str,
    *,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Checkpoint:
    """Find a model and check it.

    Args:
        name: a local folder, a local `.gguf` file, a hub id (`org/name`) or `smollm2-135m`.
        cache_dir: where fetched and converted models are kept, instead of the user's cache.
        trust_remote_code: let transformers run a tokenizer's own code from the checkpoint.
        weights: False where only the configuration and the tokenizer are needed.

    Raises:
        CheckpointError: one sentence with the remedy.
    """
    folder, base = _resolve(name, cache_dir=cache_dir, weights=weights)
    check_folder(folder)
    config = read_object(folder / "config.json", raises=CheckpointError)
    check_supported(config, name)
    return Checkpoint(
        name=name,
        folder=folder,
        base=base,
        config=config,
        eos_ids=_eos_ids(folder, config),
        weight_files=find_weights(folder, config) if weights else (),
        trust_remote_code=trust_remote_code,
    )


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer, as transformers' `AutoTokenizer` reads it; needs no torch."""
    folder = loaded_tokenizer(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    return open_tokenizer(folder, checkpoint.eos_ids)


def load_chat_template(checkpoint: Checkpoint) -> ChatTemplate:
    """The checkpoint's chat templates alone."""
    folder = loaded_tokenizer(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    return open_chat_template(folder)


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint comes with any tokenizer files."""
    return has_vocabulary(checkpoint.folder)


def load_torch_model(checkpoint: Checkpoint, *, layers: Sequence[int] | None = None) -> Any:
    """transformers' own float32 model of the checkpoint, which exports are held against.

    Args:
        checkpoint: opened with its weights.
        layers: the layers to load, where not all; the others are left out of the model.
    """
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    how = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": False}
    kind = getattr(transformers, check_supported(checkpoint.config, checkpoint.name))
    try:
        if layers is None:
            model = kind.from_pretrained(
                checkpoint.folder, local_files_only=True, use_safetensors=True, **how
            )
            return model.eval()
        config = kind.config_class.from_pretrained(checkpoint.folder, local_files_only=True)
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[layer] for layer in layers]
        tensors = _read_layers(checkpoint, layers)
        return kind.from_pretrained(None, config=config, state_dict=tensors, **how).eval()
    except Exception as error:  # the library raises whatever its own code stumbles over
        reason = " ".join(str(error).split())[:240]
        raise CheckpointError(
            f"transformers, against which an export is checked, cannot load {checkpoint.name}: "
            f"{reason or type(error).__name__}."
        ) from error


def check_supported(config: Mapping[str, Any], name: str) -> str:
    """The checkpoint's architecture.

    Raises:
        CheckpointError: it is not one we run, or its weights are quantized.
    """
    fields = Fields(config, f"config.json of {name}")
    architecture = next(iter(fields.texts("architectures")), "none named")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(
            f"{name} is a {architecture[:80]} (config.json, architectures); supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    expected = SUPPORTED_ARCHITECTURES[architecture]
    if fields.text("model_type", expected) != expected:
        raise fields.error("model_type", f"{expected}, since its architecture is {architecture}")
    for key in ("quantization_config", "compression_config"):
        if key in fields:
            method = fields.fields(key).text("quant_method", "unknown")
            raise CheckpointError(
                f"{name} holds weights quantized with {method[:80]} (config.json, {key}); use the "
                "original float weights (the compiler quantizes with mx6)."
            )
    return architecture


def _resolve(name: str, *, cache_dir: Path | None, weights: bool) -> tuple[Path, str]:
    """The local folder of a model name, and the base of the names made from it."""
    models = (cache_dir or cache_folder()) / "models"
    if name in NAMED_MODELS:
        return fetch_named(name, models), name
    path = Path(name).expanduser()
    if path.is_dir():
        return path, path.name or path.resolve().name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"There is no GGUF file {path}.")
        return convert_gguf(path, models), model_name(path)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; give the folder of the checkpoint, or a .gguf file."
        )
    if _HUB_ID.fullmatch(name):
        return fetch_hub(name, cache_dir=cache_dir, weights=weights), name.rpartition("/")[2]
    raise CheckpointError(
        f"There is no model {name!r}: it is neither a local folder, nor a .gguf file, nor a hub id "
        f"like org/name, nor {' or '.join(NAMED_MODELS)}."
    )


def _read_layers(checkpoint: Checkpoint, layers: Sequence[int]) -> dict[str, Any]:
    """The torch tensors of some layers, which are numbered anew, and all that is in no layer."""
    from safetensors import safe_open

    numbers = {str(layer): str(number) for number, layer in enumerate(layers)}
    tensors = {}
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping: it only has keys()
                head, found, tail = name.partition("model.layers.")
                number, dot, rest = tail.partition(".")
                if not found:
                    tensors[name] = file.get_tensor(name)
                elif number in numbers:
                    kept = f"{head}{found}{numbers[number]}{dot}{rest}"
                    tensors[kept] = file.get_tensor(name)
    return tensors


def _eos_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: of generation_config.json, else config.json, else the tokenizer."""
    generation = folder / "generation_config.json"
    sources = [Fields(config, f"config.json of {folder}")]
    if generation.is_file():
        sources.insert(0, Fields(read_object(generation, raises=CheckpointError), str(generation)))
    found = [source.ids("eos_token_id") for source in sources]
    return next((ids for ids in found if ids), None) or eos_token_ids(folder)
