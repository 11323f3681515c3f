"""Streams weights from safetensors to ONNX external data, block by block: memory stays bounded.

Each source tensor is read once, hashed, converted, clipped to the range of float16 (the card
computes in it) and written to every place that the graph wants it. Knows nothing of nodes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from qaic_ray.errors import CheckpointError
from qaic_ray.export.builder import WeightSpec
from qaic_ray.export.tensors import ITEM_BYTES, TensorEntry, read_into

ALIGNMENT_BYTES = 4096
"""Of every tensor's offset, so that readers can map it."""

FLOAT16_MAX = 65504.0

Array = npt.NDArray[np.floating]
Table = Callable[[], Iterator[npt.NDArray[np.float32]]]

_BLOCK_ELEMENTS = 1 << 22
_NUM_WORKERS = 2
_STRIPE_ROWS = 16
"""Rows transposed at once: as many as fill one cache line of the result."""

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Tables that older checkpoints carry and that follow from the configuration."""


@dataclass(frozen=True)
class Placement:
    """Where a tensor of the graph lies in the external data file."""

    spec: WeightSpec
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class WrittenWeights:
    """What `write_weights` did; `sha256` is of the checkpoint's tensors, however sharded."""

    sha256: str
    num_clipped: int
    num_bytes: int


@dataclass(frozen=True)
class WeightPlan:
    """Every tensor of the graph with its place, and the checkpoint's tensors they come from."""

    placements: tuple[Placement, ...]
    entries: Mapping[str, TensorEntry]
    dtype: np.dtype[np.floating]

    @property
    def num_bytes(self) -> int:
        """Size of the external data file."""
        last = self.placements[-1]
        return last.offset + last.num_bytes

    def by_source(self) -> dict[str, list[Placement]]:
        """The places of each tensor of the checkpoint, in the order of its files."""
        sources: dict[str, list[Placement]] = {}
        for placement in self.placements:
            if placement.spec.source is not None:
                sources.setdefault(placement.spec.source, []).append(placement)
        return sources


def plan_weights(
    specs: Sequence[WeightSpec], entries: Mapping[str, TensorEntry], dtype: str
) -> WeightPlan:
    """Give each tensor a place, in the order in which the checkpoint will be read.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or of another shape or type.
    """
    for spec in specs:
        _check(spec, entries)
    used = {spec.source for spec in specs}
    tied = {"lm_head.weight"} if "model.embed_tokens.weight" in used else set()
    for name in entries.keys() - used - tied:
        if not name.endswith(_IGNORED_SUFFIXES):
            raise CheckpointError(
                f"The checkpoint has a tensor {name} that its config.json does not account for."
            )

    def reading_order(spec: WeightSpec) -> tuple[str, int]:
        if spec.source is None:
            return ("", 0)
        entry = entries[spec.source]
        return (entry.path.name, entry.offset)

    item_bytes = np.dtype(dtype).itemsize
    placements, offset = [], 0
    for spec in sorted(specs, key=reading_order):
        num_bytes = prod(spec.shape) * item_bytes
        placements.append(Placement(spec, offset, num_bytes))
        offset += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return WeightPlan(tuple(placements), entries, np.dtype(dtype))


def write_weights(plan: WeightPlan, path: Path, tables: Mapping[str, Table]) -> WrittenWeights:
    """Write the external data file.

    Args:
        plan: from `plan_weights`.
        path: of the new file.
        tables: blocks of rows of each tensor that has no source, by name.

    Raises:
        CheckpointError: a weight is not a number, or a file ends early.
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        # Reserving the whole file finds a full disk before the work, not after it.
        os.posix_fallocate(descriptor, 0, plan.num_bytes)
        for placement in plan.placements:
            if placement.spec.source is None:
                _write_table(descriptor, placement, tables[placement.spec.name](), plan.dtype)
        writer = _Writer(descriptor, plan)
        with ThreadPoolExecutor(_NUM_WORKERS) as pool:
            results = list(pool.map(writer.write, plan.by_source()))
    finally:
        os.close(descriptor)
    return WrittenWeights(
        sha256=_combine(plan, {name: digest for name, digest, _ in results}),
        num_clipped=sum(num_clipped for _, _, num_clipped in results),
        num_bytes=plan.num_bytes,
    )


def weights_sha256(plan: WeightPlan) -> str:
    """The same digest as `WrittenWeights.sha256`, from reading alone."""
    buffer = np.empty(_BLOCK_ELEMENTS, np.uint8)

    def digest_of(name: str) -> str:
        digest, entry = hashlib.sha256(), plan.entries[name]
        for start in range(0, entry.num_bytes, buffer.size):
            block = buffer[: min(buffer.size, entry.num_bytes - start)]
            read_into(entry, start, block)
            digest.update(block.data)
        return digest.hexdigest()

    return _combine(plan, {name: digest_of(name) for name in plan.by_source()})


def clip_to_float16(values: Array) -> int:
    """Bring finite values and +inf into the range of float16, in place; -inf stays what it is.

    Returns:
        How many values changed.

    Raises:
        ValueError: one of them is not a number.
    """
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    if low >= -FLOAT16_MAX and high <= FLOAT16_MAX:
        return 0
    if np.isnan(low) or np.isnan(high):
        raise ValueError("not a number")
    outside = (values > FLOAT16_MAX) | ((values < -FLOAT16_MAX) & ~np.isneginf(values))
    np.copyto(values, np.clip(values, -FLOAT16_MAX, FLOAT16_MAX), where=outside)
    return int(np.count_nonzero(outside))


class _Buffers:
    """Memory of one worker: fresh pages cost more than the work on them, so they are kept."""

    def __init__(self, item_bytes: int, num_elements: int) -> None:
        self.raw = np.empty(num_elements * 4, np.uint8)
        self.wide = np.empty(num_elements, np.float32)
        self.turned = np.empty(num_elements * item_bytes, np.uint8)


class _Writer:
    """Writes one source tensor at a time; several may be under way in different threads."""

    def __init__(self, descriptor: int, plan: WeightPlan) -> None:
        self._descriptor = descriptor
        self._plan = plan
        self._places = plan.by_source()
        widest = max((p.spec.shape[-1] for p in plan.placements), default=1)
        tallest = max((p.spec.shape[0] for p in plan.placements), default=1)
        num_elements = max(_BLOCK_ELEMENTS, widest, tallest)
        self._free: SimpleQueue[_Buffers] = SimpleQueue()
        for _ in range(_NUM_WORKERS):
            self._free.put(_Buffers(plan.dtype.itemsize, num_elements))

    def write(self, source: str) -> tuple[str, str, int]:
        """The tensor's name, its digest and how many of its values were clipped."""
        buffers = self._free.get()
        try:
            return self._write(self._plan.entries[source], buffers)
        finally:
            self._free.put(buffers)

    def _write(self, entry: TensorEntry, buffers: _Buffers) -> tuple[str, str, int]:
        rows, width = entry.shape[0], prod(entry.shape[1:])
        row_bytes = width * ITEM_BYTES[entry.dtype]
        step = max(1, buffers.wide.size // width)
        if step < rows and step > 1024:
            step -= step % 1024  # whole pages of the result, where it is transposed
        digest, num_clipped = hashlib.sha256(), 0
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            raw = buffers.raw[: (stop - start) * row_bytes]
            read_into(entry, start * row_bytes, raw)
            digest.update(raw.data)
            values = _widen(raw, entry.dtype, buffers.wide)
            try:
                num_clipped += clip_to_float16(values)
            except ValueError:
                raise CheckpointError(
                    f"The tensor {entry.name} of {entry.path.name} holds a value that is not a "
                    "number (NaN); the checkpoint is damaged."
                ) from None
            block = values.reshape(stop - start, width)
            for place in self._places[entry.name]:
                self._put(place, block, start, buffers)
        return entry.name, digest.hexdigest(), num_clipped

    def _put(self, place: Placement, block: Array, start: int, buffers: _Buffers) -> None:
        dtype, (rows, width) = self._plan.dtype, block.shape
        target = buffers.turned.view(dtype)[: block.size]
        if not place.spec.transpose:
            data = block if block.dtype == dtype else _copy(block, target.reshape(block.shape))
            _pwrite(self._descriptor, data, place.offset + start * width * dtype.itemsize)
            return
        turned = target.reshape(width, rows)
        for top in range(0, rows, _STRIPE_ROWS):
            turned[:, top : top + _STRIPE_ROWS] = block[top : top + _STRIPE_ROWS].T
        full_rows = place.spec.shape[-1]
        if rows == full_rows:
            _pwrite(self._descriptor, turned, place.offset)
            return
        for row in range(width):
            at = place.offset + (row * full_rows + start) * dtype.itemsize
            _pwrite(self._descriptor, turned[row], at)


def _check(spec: WeightSpec, entries: Mapping[str, TensorEntry]) -> None:
    if spec.source is None:
        return
    entry = entries.get(spec.source)
    if entry is None:
        raise CheckpointError(f"The checkpoint has no tensor {spec.source}.")
    expected = spec.shape[::-1] if spec.transpose else spec.shape
    if entry.shape != expected:
        raise CheckpointError(
            f"The tensor {entry.name} has the shape {list(entry.shape)}; config.json says "
            f"{list(expected)}."
        )
    if entry.dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"The tensor {entry.name} has the type {entry.dtype}; supported: "
            f"{', '.join(ITEM_BYTES)}."
        )


def _widen(raw: npt.NDArray[np.uint8], dtype: str, wide: npt.NDArray[np.float32]) -> Array:
    """The float32 values of raw bytes, in `wide` where they are not float32 already."""
    if dtype == "F32":
        return raw.view(np.float32)
    num_elements = raw.size // ITEM_BYTES[dtype]
    values = wide[:num_elements]
    if dtype == "F16":
        return _copy(raw.view(np.float16), values)
    # A bfloat16 is the upper half of a float32.
    bits = values.view(np.uint32)
    bits[:] = raw.view(np.uint16)
    bits <<= np.uint32(16)
    return values


def _copy(values: Array, target: Array) -> Array:
    target[...] = values
    return target


def _write_table(
    descriptor: int, place: Placement, blocks: Iterator[Array], dtype: np.dtype[np.floating]
) -> None:
    offset = place.offset
    for block in blocks:
        data = np.ascontiguousarray(block, dtype=dtype)
        _pwrite(descriptor, data, offset)
        offset += data.nbytes


def _pwrite(descriptor: int, array: Array, offset: int) -> None:
    view = array.data.cast("B")
    while view:
        num_written = os.pwrite(descriptor, view, offset)
        view, offset = view[num_written:], offset + num_written


def _combine(plan: WeightPlan, digests: Mapping[str, str]) -> str:
    """One digest over names, types, shapes and contents, in the order of names."""
    combined = hashlib.sha256()
    for name in sorted(digests):
        entry = plan.entries[name]
        combined.update(f"{name} {entry.dtype} {entry.shape} {digests[name]}\n".encode())
    return combined.hexdigest()
