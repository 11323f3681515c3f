"""The attention of a layer: what is known of one, and the operators that compute it."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Tuple

from onnx import helper

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
BATCH_INDEX = "batch_index"
ATTENTION_MASK = "attention_mask"
CACHE_INDEX = "cache_index"
COMP_CTX_LENGTHS = "comp_ctx_lengths"
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
SEQLENS = "lowered/seqlens_k"
TOTAL = "lowered/total_sequence_length"
TOKEN_SIZES = "lowered/token_sizes"


class Cache(NamedTuple):
    """One retained key or value: its input, its output, and the node that writes it."""

    past: str
    present: str
    update: str
    rounding: Optional[str]
    is_continuous: bool


class Attention(NamedTuple):
    """One layer's attention: query [B, heads, S, dim], updates [B, kv_heads, S, dim].

    `window` is the kernel's `local_window_size`: how many tokens a query sees, -1 for all.
    """

    query: str
    key: Cache
    value: Cache
    output: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float = 0.0
    window: int = -1


def kernel_node(attention: Attention, flat: Tuple[str, str, str], output: str) -> Any:
    """GroupQueryAttention over [B, S, heads * dim] values; `output` has that form too."""
    key, value = attention.key, attention.value
    inputs = [*flat, key.past, value.past, SEQLENS, TOTAL]
    return _kernel_node(attention, inputs, [output, key.present, value.present])


def joint_nodes(
    attention: Attention, flat: Tuple[str, str, str], output: str, length: int
) -> List[Any]:
    """As `kernel_node`, for `length` tokens of every row, by one kernel a token.

    Over a past, a kernel takes several tokens of one row, or one token of several rows. Each of
    these writes into the memory that the one before it has written into.
    """
    nodes, parts = [], []
    for kind, name in zip(("query", "key", "value"), flat):
        parts.append([f"{output}/{kind}/{token}" for token in range(length)])
        nodes.append(helper.make_node("Split", [name, TOKEN_SIZES], parts[-1], axis=1))
    state = [attention.key.past, attention.value.past]
    mixed = [f"{output}/{token}" for token in range(length)]
    for token in range(length):
        inputs = [*(names[token] for names in parts), *state, token_name(SEQLENS, token), TOTAL]
        state = [attention.key.present, attention.value.present]
        if token < length - 1:
            state = [token_name(name, token) for name in state]
        nodes.append(_kernel_node(attention, inputs, [mixed[token], *state]))
    nodes.append(helper.make_node("Concat", mixed, [output], name=output, axis=1))
    return nodes


def joint_length(model: Any) -> int:
    """Tokens of every row that a graph of joint rows takes, 0 for any other graph."""
    return sum(i.name.startswith(token_name(SEQLENS, "")) for i in model.graph.input)


def token_name(name: str, token: Any) -> str:
    """What belongs to one token in a graph of joint rows."""
    return f"{name}/{token}"


def _kernel_node(attention: Attention, inputs: List[str], outputs: List[str]) -> Any:
    window = {} if attention.window < 0 else {"local_window_size": attention.window}
    return helper.make_node(
        "GroupQueryAttention",
        inputs,
        outputs,
        name=outputs[0],
        domain="com.microsoft",
        num_heads=attention.num_heads,
        kv_num_heads=attention.num_kv_heads,
        scale=attention.scale,
        **window,
    )
