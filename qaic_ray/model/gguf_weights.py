"""From the tensors of a GGUF file to safetensors of float32, one block of rows at a time.

Each tensor of the file is written under its name in transformers, or named in a refusal; each one
that the model needs is there, or named in a refusal. Values are the gguf package's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray.documents import shown
from qaic_ray.errors import CheckpointError
from qaic_ray.model.gguf_config import ROPE_DIVISORS, Family
from qaic_ray.model.gguf_file import GgufFile, GgufTensor, tensor_bytes

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
    """What one tensor of the checkpoint is made of; zeros where the file lacks a bias.

    `heads` is the number of heads whose rows are to be put in order, 0 where they are.
    """

    name: str
    shape: tuple[int, ...]
    tensor: GgufTensor | None
    heads: int = 0


def read_divisors(gguf: GgufFile) -> list[float] | None:
    """The values of `ROPE_DIVISORS`, None where there is no such tensor."""
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
    """Write the model's tensors as one safetensors file.

    Args:
        gguf: the file.
        family: its architecture.
        config: from `read_config`.
        path: of the new file.

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
    """The tensors of the checkpoint in the order of its layers, each with where it comes from."""
    needed = _needed(gguf, family, config)
    known = {name for name, *_ in needed} | {ROPE_DIVISORS}
    for name in gguf.tensors:
        if name not in known:
            raise CheckpointError(
                f"{gguf.name} has a tensor {shown(name)} that a {family.kind} of "
                f"{config['num_hidden_layers']} layers does not have."
            )
    sources = []
    for name, target, shape, heads in needed:
        tensor = gguf.tensors.get(name)
        if tensor is None and not name.endswith(".bias"):
            raise CheckpointError(f"{gguf.name} has no tensor {name}.")
        if tensor is not None and tensor.shape != shape:
            raise CheckpointError(
                f"The tensor {name} of {gguf.name} has the shape {list(tensor.shape)}; its keys "
                f"say {list(shape)}."
            )
        sources.append(_Source(target, shape, tensor, heads if family.permuted else 0))
    return sources


_Needed = tuple[str, str, tuple[int, ...], int]


def _needed(gguf: GgufFile, family: Family, config: Mapping[str, Any]) -> list[_Needed]:
    """Name in the file, name in the checkpoint, shape, and heads of a rotated projection."""
    hidden, inner, dim = (config[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {
        "attn_q": (heads * dim, hidden), "attn_k": (kv_heads * dim, hidden),
        "attn_v": (kv_heads * dim, hidden), "attn_output": (hidden, heads * dim),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    rotated = {"attn_q": heads, "attn_k": kv_heads}
    biased = {
        *(family.attention_bias if config.get("attention_bias", family.always_biased) else ()),
        *(family.mlp_bias if config.get("mlp_bias") else ()),
    }
    layer: list[_Needed] = []
    for stem, module in _PROJECTIONS.items():
        turned = rotated.get(stem, 0)
        layer.append((f"{stem}.weight", f"{module}.weight", shapes[stem], turned))
        if stem in biased:
            layer.append((f"{stem}.bias", f"{module}.bias", shapes[stem][:1], turned))
    norms = dict.fromkeys(_NORMS, hidden) | dict.fromkeys(_QK_NORMS if family.qk_norm else (), dim)
    for stem, width in norms.items():
        layer.append((f"{stem}.weight", f"{(_NORMS | _QK_NORMS)[stem]}.weight", (width,), 0))
    vocab = (config["vocab_size"], hidden)
    outside = {"model.norm.weight": (hidden,)}
    needed: list[_Needed] = [
        (name, target, outside.get(target, vocab), 0)
        for target, name in _OUTSIDE.items()
        if name != "output.weight" or name in gguf.tensors
    ]
    num_layers = config["num_hidden_layers"]
    if num_layers > len(gguf.tensors):
        raise CheckpointError(
            f"{gguf.name} says that it has {num_layers} layers; it has {len(gguf.tensors)} tensors."
        )
    for number in range(num_layers):
        needed += [
            (f"blk.{number}.{name}", f"model.layers.{number}.{target}", shape, turned)
            for name, target, shape, turned in layer
        ]
    return needed


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
