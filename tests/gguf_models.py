"""Writes GGUF files from tiny models of transformers, as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.model.checkpoint import Checkpoint, open_checkpoint

Array = npt.NDArray[Any]
Quantization = gguf.GGMLQuantizationType

VOCAB = 300
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def opened(path: Path, cache: Path) -> Checkpoint:
    """The checkpoint that a file is converted to, below `cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(cache))
        return open_checkpoint(str(path))


def random_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model of transformers all of whose parameters are random, biases and norms too."""
    config = getattr(transformers, f"{kind}Config")(**(SMALL | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise / 4 if parameter.ndim == 1 else noise / 4
    return model.eval()


def byte_vocabulary() -> dict[str, Any]:
    """Keys of a byte-level vocabulary of `VOCAB` tokens with few merges."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<s>", "</s>", "<|eot_id|>"]
    kinds = [1] * 257 + [3] * 3 + [5] * (VOCAB - len(words))
    words += [f"<pad{number}>" for number in range(len(words), VOCAB)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
    }


@dataclass
class GgufModel:
    """Keys and tensors of a file to be; both may be changed before `write`."""

    arch: str
    keys: dict[str, Any]
    tensors: dict[str, Array]
    types: dict[str, Quantization] = field(default_factory=dict)
    """Of tensors whose data are bytes of that type."""

    @classmethod
    def of(cls, model: Any, arch: str, keys: Mapping[str, Any] | None = None) -> GgufModel:
        """What llama.cpp's converter makes of a model; `keys` are without the architecture."""
        config = model.config
        permuted = arch in ("llama", "granite")
        tensors = {}
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            heads = {
                "self_attn.q_proj": config.num_attention_heads,
                "self_attn.k_proj": config.num_key_value_heads,
            }
            tensors[_name(name)] = next(
                (
                    _interleaved(value.numpy(), number)
                    for module, number in heads.items()
                    if permuted and module in name
                ),
                value.numpy(),
            )
        found = _keys(config, arch) | {f"{arch}.{k}": v for k, v in (keys or {}).items()}
        return cls(arch, found | byte_vocabulary(), tensors)

    def quantize(self, kind: Quantization, chosen: Callable[[str], bool]) -> None:
        """Store the matrices whose names are chosen in a type of the gguf package."""
        for name, value in self.tensors.items():
            if value.ndim == 2 and chosen(name):
                self.tensors[name] = gguf.quants.quantize(value, kind)
                self.types[name] = kind

    def write(self, path: Path) -> Path:
        """One file with everything."""
        self._write(path, self.keys, list(self.tensors))
        return path

    def write_split(self, folder: Path, name: str, num_parts: int) -> list[Path]:
        """Parts of about as many tensors each, the keys in the first."""
        names, paths = list(self.tensors), []
        for number in range(num_parts):
            path = folder / f"{name}-{number + 1:05d}-of-{num_parts:05d}.gguf"
            split = {
                "split.no": number,
                "split.count": num_parts,
                "split.tensors.count": len(names),
            }
            start, stop = (len(names) * n // num_parts for n in (number, number + 1))
            self._write(path, (self.keys if number == 0 else {}) | split, names[start:stop])
            paths.append(path)
        return paths

    def _write(self, path: Path, keys: Mapping[str, Any], names: list[str]) -> None:
        writer = gguf.GGUFWriter(path, self.arch)
        for key, value in keys.items():
            _add(writer, key, value)
        for name in names:
            writer.add_tensor(
                name, np.ascontiguousarray(self.tensors[name]), raw_dtype=self.types.get(name)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    module, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER[module]}.{suffix}"


def _interleaved(value: Array, heads: int) -> Array:
    """Rows of the halves of each head put side by side."""
    shape = (heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return value.reshape(shape).swapaxes(1, 2).reshape(value.shape)


def _keys(config: Any, arch: str) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }
    return {f"{arch}.{key}": value for key, value in keys.items()}


def _add(writer: Any, key: str, value: Any) -> None:
    kind = gguf.GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
    elif key in ("split.no", "split.count"):
        writer.add_key_value(key, value, kind.UINT16)
    elif key == "split.tensors.count":
        writer.add_key_value(key, value, kind.INT32)
    elif isinstance(value, bool):
        writer.add_key_value(key, value, kind.BOOL)
    elif isinstance(value, int) and value < 0:
        writer.add_key_value(key, value, kind.INT32)
    elif isinstance(value, int):
        writer.add_key_value(key, value, kind.UINT32)
    elif isinstance(value, float):
        writer.add_key_value(key, value, kind.FLOAT32)
    else:
        writer.add_key_value(key, value, kind.STRING)
