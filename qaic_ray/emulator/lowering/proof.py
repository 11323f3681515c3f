"""Proves by numbers that one GroupQueryAttention computes what the nodes of an attention do.

The nodes run on random inputs of all forms that the lowered graph will be used for, and
com.microsoft's kernel has to give the same result and the same cache, with past and present in one
memory. With positions of each token's own: first and later chunks, padding, ragged rows, decode,
idle rows. With one cache index for all rows: padding on the left of any length, in the first chunk
and beyond it, and a cache that has each row's first token in front (`lockstep`). And some tokens
far into the whole context, because a window of attention shows only behind its end.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from .attention import (
    ATTENTION_MASK,
    BATCH_INDEX,
    CACHE_INDEX,
    COMP_CTX_LENGTHS,
    INPUT_IDS,
    POSITION_IDS,
    SEQLENS,
    TOTAL,
    Attention,
    kernel_node,
)
from .view import ORT_ERRORS, NotLowered, Part, part_session

_TOLERANCE = 2e-5
_SLOTS, _CTX = 3, 8
_FAR_TOKENS = 3
_MAX_FAR_BYTES = 1 << 30


def proven(part: Part, attention: Attention, ctx_len: int) -> Attention:
    """Run the part and the kernel on the same inputs; returns what makes them equal.

    Raises:
        NotLowered: where nothing does.
    """
    run = part.session()
    rng = np.random.default_rng(0)
    far = _far_len(part, attention, ctx_len)
    cases = _cases(part, attention, rng, far)
    expected = [run(case.feeds(attention), _named_sizes(part, case)) for case in cases]
    for window in _windows(part, ctx_len):
        for scale in _scales(part, attention.head_dim):
            candidate = attention._replace(scale=scale, window=window)
            kernel = _kernel(part.view.model, candidate)
            if all(case.equal(candidate, kernel, want) for case, want in zip(cases, expected)):
                return candidate
    raise NotLowered(f"{attention.output} is not the attention that the kernel computes")


def _far_len(part: Part, attention: Attention, ctx_len: int) -> int:
    """As much of the context as the far cases take.

    Raises:
        NotLowered: where what is left out could be of another kind.
    """
    heads = 2 * (attention.num_heads + attention.num_kv_heads)
    far = max(min(ctx_len, _MAX_FAR_BYTES // (8 * heads * attention.head_dim)), _CTX)
    if any(far < number <= ctx_len for number in part.numbers("i")):
        raise NotLowered(f"{attention.output} may have a window longer than {far} tokens")
    return far


def _windows(part: Part, ctx_len: int) -> List[int]:
    """What the window may be: none, and those that numbers in the part can mean."""
    numbers = [number for number in part.numbers("i") if 1 < number < ctx_len]
    return [-1, *dict.fromkeys(n + step for n in numbers for step in (0, -1, 1))]


def _cases(part: Part, attention: Attention, rng: Any, far: int) -> List[Any]:
    starts = [start for start in (far * 2 // 3, far - _FAR_TOKENS) if start >= _CTX]
    if ATTENTION_MASK in part.inputs:
        shapes = [(*shape, _CTX) for shape in _LOCKSTEP_CASES]
        shapes += [([1], start, _FAR_TOKENS, far) for start in starts]
        return [_lockstep_case(part, attention, rng, shape) for shape in shapes]
    cases = [_case(attention, rng, shape, _CTX) for shape in _CASES]
    for start in starts:
        where = [list(range(start, start + _FAR_TOKENS))]
        cases.append(_case(attention, rng, (where, [1]), far))
    return cases


def _named_sizes(part: Part, case: Any) -> Dict[Any, int]:
    # Names of dims are the exporter's own; they are read off the inputs whose meaning is known.
    view, sizes = part.view, {}
    known = dict(case.inputs(), **{INPUT_IDS: case.tokens()})
    known.update({n: case.past for n in part.inputs if n.startswith("past")})
    for name, array in known.items():
        for dim, size in zip(view.shapes.get(name, ()), array.shape):
            if isinstance(dim, str):
                sizes[dim] = size
    for name in view.inputs & {COMP_CTX_LENGTHS}:
        sizes.update({d: case.past.shape[2] for d in view.shapes[name] if isinstance(d, str)})
    return sizes


def _scales(part: Part, head_dim: int) -> List[float]:
    """What the scores may be multiplied by: the usual, and every number in the part."""
    scales = [head_dim**-0.5, 1.0]
    for number in part.numbers():
        scales += [number, 1 / number]
    return list(dict.fromkeys(scales))


class Case(NamedTuple):
    """One set of inputs: valid positions first in each row, -1 after them."""

    query: Any
    key: Any
    value: Any
    past: Any
    positions: Any
    slots: Any

    def inputs(self) -> Dict[str, Any]:
        """Inputs of the graph that say which rows and tokens there are."""
        return {POSITION_IDS: self.positions, BATCH_INDEX: self.slots}

    def tokens(self) -> Any:
        """Zeros in the shape of the token ids."""
        return np.zeros_like(self.positions)

    def feeds(self, attention: Attention) -> Dict[str, Any]:
        """Inputs of the part that was cut out."""
        return dict(_values(self, attention), **self.inputs())

    def equal(self, attention: Attention, kernel: Any, expected: List[Any]) -> bool:
        """Whether the kernel, row by row and without padding, gives what the part gave."""
        keys, values = self.past.copy(), -self.past
        for row, slot in enumerate(self.slots[:, 0]):
            valid = self.positions[row] >= 0
            if not valid.any():
                continue
            flat = [_flat(x[row : row + 1, :, valid]) for x in (self.query, self.key, self.value)]
            total = self.positions[row].max() + 1
            out = kernel(flat, (keys[slot : slot + 1], values[slot : slot + 1]), total)
            wanted = _flat(expected[0][row : row + 1, :, valid])
            if not np.allclose(out, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
                return False
        return np.array_equal(keys, expected[1]) and np.array_equal(values, expected[2])


class LockstepCase(NamedTuple):
    """One set of inputs: row b has `pads[b]` slots of padding, and all write from `start` on.

    `mask` is as the graph is given it: it may lack the last token, and have later ones.
    """

    query: Any
    key: Any
    value: Any
    past: Any
    mask: Any
    start: Any
    pads: Any

    def inputs(self) -> Dict[str, Any]:
        """Inputs of the graph that say which rows and tokens there are."""
        return {ATTENTION_MASK: self.mask, CACHE_INDEX: self.start}

    def tokens(self) -> Any:
        """Zeros in the shape of the token ids."""
        return np.zeros((self.query.shape[0], self.query.shape[2]), np.int64)

    def feeds(self, attention: Attention) -> Dict[str, Any]:
        """Inputs of the part that was cut out."""
        return dict(_values(self, attention), **self.inputs())

    def equal(self, attention: Attention, kernel: Any, expected: List[Any]) -> bool:
        """Whether the kernel gives what the part gave to tokens, over a cache without padding.

        The cache of a row is rolled so that its first token is in front, as when it is used. What
        the part writes for padding has to be the padding's own keys and values.
        """
        start = int(self.start.reshape(()))
        stop = start + self.query.shape[2]
        mask = self.mask.copy()
        mask[:, stop - 1] = 1
        if not np.array_equal(expected[3], mask):
            return False
        for row, pad in enumerate(self.pads):
            first = max(pad - start, 0)
            flat = [_flat(x[row : row + 1, :, first:]) for x in (self.query, self.key, self.value)]
            past = np.roll(self.past[row : row + 1], -pad, axis=2)
            caches = (past, -past)
            out = kernel(flat, caches, stop - pad)
            wanted = _flat(expected[0][row : row + 1, :, first:])
            if not np.allclose(out, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
                return False
            for cache, update, present in zip(caches, (self.key, self.value), expected[1:3]):
                whole = np.roll(cache, pad, axis=2)
                whole[:, :, start : start + first] = update[row, :, :first]
                if not np.array_equal(whole[0], present[row]):
                    return False
        return True


def _values(case: Any, attention: Attention) -> Dict[str, Any]:
    return {
        attention.query: case.query,
        attention.key.update: case.key,
        attention.value.update: case.value,
        attention.key.past: case.past,
        attention.value.past: -case.past,
    }


def _flat(x: Any) -> Any:
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1))


# Positions of each row, and its slot: first chunk, later chunk, padded, ragged, decode, idle row.
_CASES = (
    ([[0, 1, 2]], [1]),
    ([[3, 4, 5]], [2]),
    ([[2, 3, -1]], [0]),
    ([[0, 1, 2, 3], [4, 5, -1, -1]], [2, 0]),
    ([[7], [0], [4]], [0, 1, 2]),
    ([[5], [-1], [2]], [0, 1, 2]),
)


def _case(attention: Attention, rng: Any, shape: Tuple[Any, Any], ctx_len: int) -> Case:
    positions, slots = shape
    where = np.array(positions, np.int64)
    batch, length = where.shape
    num_slots = _SLOTS if attention.key.is_continuous else batch
    index = slots if attention.key.is_continuous else range(batch)
    query, key, value, past = _arrays(attention, rng, (batch, length, num_slots, ctx_len))
    return Case(query, key, value, past, where, np.array(list(index), np.int64)[:, None])


# Padding of each row, the first slot that is written, and tokens: first chunk, padded ones, a chunk
# and a half of padding, a prompt of one token, decode, the whole context.
_LOCKSTEP_CASES = (
    ([0], 0, 3),
    ([2, 0], 0, 4),
    ([5, 1, 4], 3, 3),
    ([3], 0, 4),
    ([2, 0, 5], 6, 1),
    ([1, 0], 0, _CTX),
)


def _lockstep_case(
    part: Part, attention: Attention, rng: Any, shape: Tuple[List[int], int, int, int]
) -> LockstepCase:
    pads, start, length, ctx_len = shape
    view, stop = part.view, start + length
    mask = np.arange(ctx_len) >= np.array(pads)[:, None]
    mask[:, stop:] = rng.random((len(pads), ctx_len - stop)) < 1 / 2
    mask[:, stop - 1] = rng.random(len(pads)) < 1 / 2
    kinds = [
        helper.tensor_dtype_to_np_dtype(view.types[name]) for name in (ATTENTION_MASK, CACHE_INDEX)
    ]
    index = np.full([1] * len(view.shape(CACHE_INDEX)), start, kinds[1])
    query, key, value, past = _arrays(attention, rng, (len(pads), length, len(pads), ctx_len))
    return LockstepCase(query, key, value, past, mask.astype(kinds[0]), index, pads)


def _arrays(attention: Attention, rng: Any, sizes: Tuple[int, int, int, int]) -> List[Any]:
    """Random query, key, value and past for so many rows, tokens, slots and positions."""
    batch, length, num_slots, ctx_len = sizes
    heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    shapes = (
        (batch, heads, length, dim),
        (batch, kv_heads, length, dim),
        (batch, kv_heads, length, dim),
        (num_slots, kv_heads, ctx_len, dim),
    )
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _kernel(model: Any, attention: Attention) -> Any:
    flat = ("query", "key", "value")
    widths = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
    infos = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, None, w * attention.head_dim])
        for n, w in zip(flat, widths)
    ]
    cache = [1, attention.num_kv_heads, "ctx_len", attention.head_dim]
    pasts = (attention.key.past, attention.value.past)
    infos += [helper.make_tensor_value_info(n, TensorProto.FLOAT, cache) for n in pasts]
    infos.append(helper.make_tensor_value_info(SEQLENS, TensorProto.INT32, [1]))
    infos.append(helper.make_tensor_value_info(TOTAL, TensorProto.INT32, []))
    names = ("output", attention.key.present, attention.value.present)
    outputs = [helper.make_empty_tensor_value_info(n) for n in names]
    graph = helper.make_graph([kernel_node(attention, flat, "output")], "kernel", infos, outputs)
    session = part_session(model, graph)

    def call(values: List[Any], caches: Tuple[Any, Any], total: int) -> Any:
        """Result [B, S, heads * dim]; the caches are written in place, as when it is used."""
        binding = session.io_binding()
        for name, array in zip(flat, values):
            binding.bind_cpu_input(name, array)
        binding.bind_cpu_input(SEQLENS, np.array([total - 1], np.int32))
        binding.bind_cpu_input(TOTAL, np.array(total, np.int32))
        binding.bind_output("output")
        for cache, array in zip((attention.key, attention.value), caches):
            shared = ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(cache.past, shared)
            binding.bind_ortvalue_output(cache.present, shared)
        try:
            session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise NotLowered(f"the kernel refuses {attention.output}: {error}") from error
        return binding.get_outputs()[0].numpy()

    return call
