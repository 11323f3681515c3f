"""A model before and after it is exported: a checkpoint, and the manifest of a `<base>-kv` folder.

A checkpoint is found by name and checked: it must be safe and of a kind that we run. Importing this
module loads neither transformers nor torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qaic_ray.contract import IoContract
from qaic_ray.errors import CheckpointError, UsageError
from qaic_ray.files.documents import checked, read_object, shown
from qaic_ray.files.folders import KeptFile, SourceFile, first_fault, inside
from qaic_ray.model import tokenizer
from qaic_ray.model.chat import ChatTemplate
from qaic_ray.model.sources import check_folder, find_folder, find_weights
from qaic_ray.model.tokenizer import Tokenizer, eos_token_ids, loaded_tokenizer, open_tokenizer

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GraniteForCausalLM": "granite",
}
"""Classes of transformers, and the `model_type` of each."""
MANIFEST_FILE = "manifest.json"
CUSTOM_IO_FILE = "custom_io.yaml"
VERIFY_FILE = "verify.json"
MANIFEST_FORMAT = 2
"""Raised when equal options would give other files, so that older exports are made again."""
MAX_SIZE = 2**31 - 1

_MAY_DIFFER = {"name", "source", "sources", "num_clipped", "files"}  # between two equal exports
_LAYER = re.compile(r"(.*?model\.layers\.)([^.]*)", re.DOTALL)
_LARGEST = sys.float_info.max


class Fields:
    """Fields of a checkpoint's config.json, each read as the type and in the range it must have.

    A value that is not so is a CheckpointError that names file, key and value.

    Args:
        values: the JSON object, in which a key may be null.
        source: names it in errors, such as `config.json`.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self._source = source

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; `default` where the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        """A whole number from 1 to `most`; `default` where the key is missing or null."""
        value = self.get(key, default)
        is_size = type(value) is int and 1 <= value <= most
        return int(self._checked(key, value, is_size, f"a whole number from 1 to {most}"))

    def number(self, key: str, default: float | None = None, *, least: float, most: float) -> float:
        """A number from `least` to `most`, never NaN; `default` where the key is missing."""
        value = self.values.get(key, default)
        self._checked(key, value, type(value) in (int, float), "a number")
        # NaN is in no range, and a whole number may be larger than any float.
        is_within = max(least, -_LARGEST) <= value <= min(most, _LARGEST)
        return float(self._checked(key, value, is_within, f"a number from {least:g} to {most:g}"))

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false; `default` where the key is missing."""
        value = self.values.get(key, default)
        return bool(self._checked(key, value, isinstance(value, bool), "true or false"))

    def text(self, key: str, default: str) -> str:
        """A text; `default` where the key is missing or null."""
        value = self.get(key, default)
        return str(self._checked(key, value, isinstance(value, str), "a text"))

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where the key is missing or null."""
        value = self.get(key, [])
        are_texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return list(self._checked(key, value, are_texts, "a list of texts"))

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id or several; empty where the key is missing or null."""
        value = self.get(key, [])
        several = value if isinstance(value, list) else [value]
        are_ids = all(type(item) is int and 0 <= item <= MAX_SIZE for item in several)
        return tuple(self._checked(key, several, are_ids, "a token id, or a list of them"))

    def fields(self, key: str) -> Fields:
        """The fields of an object inside; none where the key is missing or null."""
        value = self.get(key, {})
        self._checked(key, value, isinstance(value, dict), "an object")
        return Fields(value, f"{key} of {self._source}")

    def _checked(self, key: str, value: Any, is_right: bool, must: str) -> Any:
        if not is_right:
            raise self.error(key, must)
        return value

    def error(self, key: str, must: str) -> CheckpointError:
        """The error of a key whose value is not what it must be."""
        given = f"is {shown(self.get(key))}" if key in self.values else "is missing"
        return CheckpointError(f"{key} in {self._source} {given}; it must be {must}.")


@dataclass(frozen=True)
class Checkpoint:
    """A model's files on this machine.

    `name` is what the user wrote, `base` what exported folders are named after, `config` the
    content of `config.json`. `weight_files` is empty when opened with `weights=False`.
    """

    name: str
    folder: Path
    base: str
    config: Mapping[str, Any]
    eos_ids: tuple[int, ...]
    weight_files: tuple[Path, ...]
    trust_remote_code: bool = False


def open_checkpoint(
    name: str, *, trust_remote_code: bool = False, weights: bool = True
) -> Checkpoint:
    """Find a model and check it.

    Args:
        name: a local folder, a local `.gguf` file, a hub id (`org/name`) or `smollm2-135m`.
        trust_remote_code: let transformers run a tokenizer's own code from the checkpoint.
        weights: False where only the configuration and the tokenizer are needed.

    Raises:
        CheckpointError: one sentence with the remedy.
    """
    folder, base = find_folder(name, weights=weights)
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
    """The checkpoint's tokenizer, as transformers' `AutoTokenizer` reads it; loads no torch."""
    folder = loaded_tokenizer(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    return open_tokenizer(folder, checkpoint.eos_ids)


def load_chat_template(checkpoint: Checkpoint) -> ChatTemplate:
    """The checkpoint's chat templates, without its tokens."""
    folder = loaded_tokenizer(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    return tokenizer.open_chat_template(folder)


def load_torch_model(checkpoint: Checkpoint, *, layers: Sequence[int] | None = None) -> Any:
    """transformers' float32 model of a checkpoint, which exports are compared with.

    With `layers` only those layers are kept.
    """
    import torch
    import transformers

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
    except Exception as error:  # the library raises anything
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


def _read_layers(checkpoint: Checkpoint, layers: Sequence[int]) -> dict[str, Any]:
    """The torch tensors of some layers, numbered from 0, and those of no layer."""
    from safetensors import safe_open

    numbers = {str(layer): str(number) for number, layer in enumerate(layers)}
    tensors = {}
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping: it only has keys()
                match = _LAYER.match(name)
                if match is None:
                    tensors[name] = file.get_tensor(name)
                elif match[2] in numbers:
                    kept = f"{match[1]}{numbers[match[2]]}{name[match.end() :]}"
                    tensors[kept] = file.get_tensor(name)
    return tensors


def _eos_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: of generation_config.json, else config.json, else the tokenizer."""
    generation = folder / "generation_config.json"
    sources = (
        Fields(tokenizer.object_if_there(generation), str(generation)),
        Fields(config, f"config.json of {folder}"),
    )
    found = [source.ids("eos_token_id") for source in sources]
    return next((ids for ids in found if ids), None) or eos_token_ids(folder)


# -- an exported model


@dataclass(frozen=True)
class ModelManifest:
    """One exported model.

    `onnx_file` is relative to the folder. `max_position` is the longest context (`ctx_len`) that
    the graph is correct for. `weights_sha256` is over the checkpoint's tensors, however sharded.
    `num_clipped` weights were beyond the range of float16. `sources` tell a later export whether
    the weight files have changed, without reading them. `files` are the export's own; older
    versions list none. `num_kv_heads` is that of the KV cache: the checkpoint's times
    `num_replicate_kv_heads`. `logits` and `next_tokens` describe the first output, `kv_dtype` is
    what custom_io.yaml asks for, `comp_ctx_lengths` tells whether there is such an input. Where
    `weights` is `reference` they stay in the checkpoint: `weights_sha256` is then of what points at
    them, and nothing is clipped.
    """

    format: int
    name: str
    source: str
    contract: IoContract
    continuous: bool
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    opset: int
    dtype: str
    eos_ids: tuple[int, ...]
    onnx_file: str
    weights_sha256: str
    architecture_sha256: str
    num_clipped: int
    tool_versions: Mapping[str, str]
    sources: tuple[SourceFile, ...]
    kv_dtype: str = "float16"
    logits: str = "last"
    next_tokens: bool = False
    num_replicate_kv_heads: int = 1
    comp_ctx_lengths: bool = False
    weights: str = "copy"
    files: tuple[KeptFile, ...] = ()

    def same_making(self, other: ModelManifest) -> bool:
        """Whether weights, options, format and tools are equal."""
        return replace(self, **{name: getattr(other, name) for name in _MAY_DIFFER}) == other

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        document = asdict(self) | {"contract": self.contract.value}
        return json.dumps(document, indent=2) + "\n"


def read_manifest(model_dir: Path) -> ModelManifest:
    """Read the manifest of an exported model.

    Raises:
        UsageError: the folder is not an exported model, or one of another format.
    """
    path = model_dir / MANIFEST_FILE
    if not os.path.lexists(path):
        raise UsageError(
            f"{model_dir} is not an exported model (it has no {MANIFEST_FILE}); make one with "
            "`qaic-ray export --model ...`."
        )
    try:
        document = read_object(path)
        if document.get("format") != MANIFEST_FORMAT:
            raise UsageError(
                f"{path} has format {shown(document.get('format'))}, not {MANIFEST_FORMAT}."
            )
        manifest = checked(ModelManifest, document, str(path))
        inside(manifest.onnx_file)
    except (UsageError, ValueError) as error:
        raise UsageError(f"{str(error).rstrip('.')}; export the model again.") from error
    return manifest


def check_files(model_dir: Path, manifest: ModelManifest) -> None:
    """Check that the files of an exported model are what was written.

    Raises:
        UsageError: naming a file that is not.
    """
    fault = first_fault(model_dir, manifest.files)
    if fault:
        raise UsageError(f"{fault} in {model_dir}: export the model again.")
