"""Converts a GGUF file to the folder of a checkpoint: config, float32 weights, tokenizer files.

Weights are written some rows at a time, so memory stays small. A tensor that is unknown or missing
is named in an error. The gguf package computes the values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray.errors import CheckpointError
from qaic_ray.files.documents import shown
from qaic_ray.model.gguf_config import ROPE_DIVISORS, Family, family_of, read_config
from qaic_ray.model.gguf_file import GgufFile, GgufTensor, read_gguf, tensor_bytes
from qaic_ray.model.gguf_tokenizer import end_ids, write_tokenizer

Floats = npt.NDArray[np.float32]

_BLOCK_VALUES = 1 << 24
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class _Source:
    """What the tensor `name` of the checkpoint is made of.

    `heads` is above 0 where the rows of each head are stored for pairs of neighbours. `tensor` is
    None for a bias that the file lacks, which is zeros.
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    tensor: GgufTensor | None = None


def write_conversion(path: Path, folder: Path) -> None:
    """Convert a GGUF file, with all its parts, into an empty folder.

    Raises:
        CheckpointError: it is damaged, or holds something that we do not know.
    """
    gguf = read_gguf(path)
    family = family_of(gguf)
    config = read_config(gguf, read_divisors(gguf))
    # First, because it checks the vocabulary.
    write_tokenizer(gguf.keys, gguf.name, folder)
    ids = {
        "eos_token_id": list(end_ids(gguf.keys, gguf.name)) or None,
        "bos_token_id": gguf.keys.get("tokenizer.ggml.bos_token_id"),
    }
    for name, fields in (("config.json", config | ids), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n")
    write_weights(gguf, family, config, folder / "model.safetensors")


def read_divisors(gguf: GgufFile) -> list[float] | None:
    """The values of the tensor `ROPE_DIVISORS`; None where there is none."""
    tensor = gguf.tensors.get(ROPE_DIVISORS)
    if tensor is None:
        return None
    if len(tensor.shape) != 1 or prod(tensor.shape) > 4096:
        raise CheckpointError(
            f"{gguf.name} has {ROPE_DIVISORS} of the shape {list(tensor.shape)}; it must have one "
            "dimension, half a head."
        )
    return [float(value) for value in _read(tensor)]


def write_weights(gguf: GgufFile, family: Family, config: Mapping[str, Any], path: Path) -> None:
    """Write the model's tensors as one safetensors file; `config` is from `read_config`.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or of an unreadable type.
    """
    sources = _account(gguf, family, config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for source in sources:
        end = offset + 4 * prod(source.shape)
        header[source.name] = {
            "dtype": "F32", "shape": list(source.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in sources:
            for block in _blocks(source):
                file.write(np.ascontiguousarray(block, dtype="<f4").data)


def _account(gguf: GgufFile, family: Family, config: Mapping[str, Any]) -> list[_Source]:
    """The tensors of the checkpoint in the order of its layers, each with its source."""
    num_layers = config["num_hidden_layers"]
    if num_layers > len(gguf.tensors):
        raise CheckpointError(
            f"{gguf.name} says that it has {num_layers} layers; it has {len(gguf.tensors)} tensors."
        )
    needed = _needed(gguf, family, config)
    for name in gguf.tensors:
        if name not in needed and name != ROPE_DIVISORS:
            raise CheckpointError(
                f"{gguf.name} has a tensor {shown(name)} that a {family.kind} of "
                f"{num_layers} layers does not have."
            )
    sources = []
    for name, source in needed.items():
        tensor = gguf.tensors.get(name)
        if tensor is None and not name.endswith(".bias"):
            raise CheckpointError(f"{gguf.name} has no tensor {name}.")
        if tensor is not None and tensor.shape != source.shape:
            raise CheckpointError(
                f"The tensor {name} of {gguf.name} has the shape {list(tensor.shape)}; its keys "
                f"say {list(source.shape)}."
            )
        sources.append(replace(source, tensor=tensor))
    return sources


def _needed(gguf: GgufFile, family: Family, config: Mapping[str, Any]) -> dict[str, _Source]:
    """The tensors that the checkpoint needs, by their names in the file."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    needed = {}
    for target, name in _OUTSIDE.items():
        if name != "output.weight" or name in gguf.tensors:
            norm = target == "model.norm.weight"
            needed[name] = _Source(target, (hidden,) if norm else (vocab, hidden))
    layer = _needed_of_layer(family, config)
    for number in range(config["num_hidden_layers"]):
        for name, source in layer.items():
            target = f"model.layers.{number}.{source.name}"
            needed[f"blk.{number}.{name}"] = replace(source, name=target)
    return needed


def _needed_of_layer(family: Family, config: Mapping[str, Any]) -> dict[str, _Source]:
    hidden, inner, dim = (config[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {
        "attn_q": (heads * dim, hidden), "attn_k": (kv_heads * dim, hidden),
        "attn_v": (kv_heads * dim, hidden), "attn_output": (hidden, heads * dim),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    permuted = {"attn_q": heads, "attn_k": kv_heads} if family.permuted else {}
    biased = {
        *(family.attention_bias if config.get("attention_bias", family.always_biased) else ()),
        *(family.mlp_bias if config.get("mlp_bias") else ()),
    }
    layer = {}
    for stem, module in _PROJECTIONS.items():
        shape, of_heads = shapes[stem], permuted.get(stem, 0)
        layer[f"{stem}.weight"] = _Source(f"{module}.weight", shape, of_heads)
        if stem in biased:
            layer[f"{stem}.bias"] = _Source(f"{module}.bias", shape[:1], of_heads)
    for stem, module in _NORMS.items():
        layer[f"{stem}.weight"] = _Source(f"{module}.weight", (hidden,))
    for stem, module in _QK_NORMS.items() if family.qk_norm else ():
        layer[f"{stem}.weight"] = _Source(f"{module}.weight", (dim,))
    return layer


def _blocks(source: _Source) -> Iterator[Floats]:
    """The values of a tensor of the checkpoint, some rows at a time."""
    if source.tensor is None:
        yield np.zeros(source.shape, np.float32)
        return
    order = np.arange(source.shape[0])
    if source.heads:
        order = order.reshape(source.heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if len(source.shape) == 1:
        yield _read(source.tensor)[order]
        return
    step = max(1, _BLOCK_VALUES // source.shape[1])
    for start in range(0, len(order), step):
        yield _read(source.tensor, order[start : start + step])


def _read(tensor: GgufTensor, rows: npt.NDArray[np.int64] | None = None) -> Floats:
    """The values of a tensor, or of some of its rows."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import QuantError, dequantize

    row_bytes = tensor_bytes(tensor.name, tensor.kind, tensor.shape[-1:])
    shape = (*tensor.shape[:-1], row_bytes)
    stored = np.memmap(tensor.path, np.uint8, "r", offset=tensor.offset, shape=shape)
    kind = GGMLQuantizationType(tensor.kind)
    try:
        values: Floats = dequantize(np.array(stored if rows is None else stored[rows]), kind)
    except (NotImplementedError, QuantError) as error:
        raise CheckpointError(
            f"The tensor {tensor.name} has the type {kind.name}, which the installed gguf package "
            "cannot read."
        ) from error
    return values
