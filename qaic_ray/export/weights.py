"""Streams weights from safetensors to ONNX external data, block by block: memory stays bounded.

Each source tensor is read once, hashed, converted, clipped to the range of float16 (the card
computes in it) and written to every place that the graph has for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from qaic_ray.errors import CheckpointError
from qaic_ray.export.architecture import Architecture
from qaic_ray.export.builder import WeightSpec
from qaic_ray.export.conversion import Array, Converter
from qaic_ray.weight_files.tensors import ITEM_BYTES, TensorEntry, read_into

ALIGNMENT_BYTES = 4096
"""Of every tensor's offset, so that readers can map it."""

Table = Callable[[], Iterator[npt.NDArray[np.float32]]]

_NUM_WORKERS = 2
_STRIPE_ROWS = 16
"""Rows transposed at once: about as many as fill one cache line of the result."""

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Tables that older checkpoints carry and that follow from the configuration."""
_QUANTIZED_SUFFIXES = (
    *("qweight", "qzeros", "scales", "g_idx", "_scale", "_scale_inv", "_scale_2"),
    *("_packed", "_zero_point", "absmax", "_blocks"),
)


@dataclass(frozen=True)
class BlockSizes:
    """Values that are worked on at once: `read` of a tensor, `transposed` for one write."""

    read: int = 1 << 19
    transposed: int = 1 << 25


BLOCK_SIZES = BlockSizes()


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

    def of_tables(self) -> WeightPlan:
        """The plan of what no file of the checkpoint holds, which stands in front."""
        tables = tuple(place for place in self.placements if place.spec.source is None)
        return replace(self, placements=tables)

    def by_source(self) -> dict[str, list[Placement]]:
        """The places of each tensor of the checkpoint, in the order of its files."""
        sources: dict[str, list[Placement]] = {}
        for placement in self.placements:
            if placement.spec.source is not None:
                sources.setdefault(placement.spec.source, []).append(placement)
        return sources


def fit_architecture(
    architecture: Architecture, entries: Mapping[str, TensorEntry]
) -> Architecture:
    """The architecture that a config.json and the checkpoint's tensors make together.

    An `lm_head.weight` that is there is used, also where the embeddings are said to be tied, as in
    transformers.

    Raises:
        CheckpointError: there are more layers than tensors.
    """
    if architecture.num_layers > len(entries):
        raise CheckpointError(
            f"num_hidden_layers in config.json is {architecture.num_layers}; the checkpoint has "
            f"only {len(entries)} tensors."
        )
    tied = architecture.tied_embeddings and "lm_head.weight" not in entries
    return replace(architecture, tied_embeddings=tied)


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
    for name in sorted(entries.keys() - used):
        if not name.endswith(_IGNORED_SUFFIXES):
            raise CheckpointError(
                f"The checkpoint has a tensor {name[:80]} that its config.json does not account "
                f"for{_hint(name)}."
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


def write_weights(
    plan: WeightPlan, path: Path, tables: Mapping[str, Table], sizes: BlockSizes = BLOCK_SIZES
) -> WrittenWeights:
    """Write the external data file.

    Args:
        plan: from `plan_weights`.
        path: of the new file.
        tables: blocks of rows of each tensor that has no source, by name.
        sizes: what bounds the memory.

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
        free: SimpleQueue[_Writer] = SimpleQueue()
        for _ in range(_NUM_WORKERS):
            free.put(_Writer(descriptor, plan, sizes))

        def write(source: str) -> tuple[str, str, int]:
            writer = free.get()
            try:
                return writer.write(plan.entries[source])
            finally:
                free.put(writer)

        with ThreadPoolExecutor(_NUM_WORKERS) as pool:
            results = list(pool.map(write, plan.by_source()))
    finally:
        os.close(descriptor)
    return WrittenWeights(
        sha256=_combine(plan, {name: digest for name, digest, _ in results}),
        num_clipped=sum(num_clipped for _, _, num_clipped in results),
    )


def weights_sha256(plan: WeightPlan) -> str:
    """The same digest as `WrittenWeights.sha256`, from reading alone."""
    buffer = np.empty(BLOCK_SIZES.read, np.uint8)

    def digest_of(name: str) -> str:
        digest, entry = hashlib.sha256(), plan.entries[name]
        for start in range(0, entry.num_bytes, buffer.size):
            block = buffer[: min(buffer.size, entry.num_bytes - start)]
            read_into(entry, start, block)
            digest.update(block.data)
        return digest.hexdigest()

    return _combine(plan, {name: digest_of(name) for name in plan.by_source()})


class _Transposed:
    """Collects blocks of rows of one tensor as columns, and writes as many as fit at once.

    Every part of a row is a write call of its own, so there should be few, long ones.
    """

    def __init__(self, place: Placement, memory: Array, step: int) -> None:
        self._place = place
        width, self._num_columns = place.spec.shape
        fitting = memory.size // width
        self._most = min(self._num_columns, max(step, fitting - fitting % step))
        self._memory = memory
        self._start = 0
        self._filled = 0

    def add(self, block: Array, descriptor: int) -> None:
        """Put the next rows of the checkpoint into their columns."""
        group = self._group()
        rows = len(block)
        for top in range(0, rows, _STRIPE_ROWS):
            stripe = block[top : top + _STRIPE_ROWS]
            at = self._filled + top
            group[:, at : at + len(stripe)] = stripe.T
        self._filled += rows
        if self._filled == group.shape[1]:
            self._write(group, descriptor)

    def _group(self) -> Array:
        width = self._place.spec.shape[0]
        columns = min(self._most, self._num_columns - self._start)
        return self._memory[: width * columns].reshape(width, columns)

    def _write(self, group: Array, descriptor: int) -> None:
        item, offset = group.itemsize, self._place.offset
        if group.shape[1] == self._num_columns:
            _pwrite(descriptor, group, offset)
        else:
            for row, part in enumerate(group):
                at = offset + (row * self._num_columns + self._start) * item
                _pwrite(descriptor, part, at)
        self._start += group.shape[1]
        self._filled = 0


class _Writer:
    """Writes one source tensor at a time, with memory of its own."""

    def __init__(self, descriptor: int, plan: WeightPlan, sizes: BlockSizes) -> None:
        self._descriptor = descriptor
        self._places = plan.by_source()
        least = max(placement.spec.least_elements for placement in plan.placements)
        num_elements = max(sizes.read, least)
        self._raw = np.empty(num_elements * 4, np.uint8)
        self._converter = Converter(plan.dtype, num_elements)
        # The kernel gives it pages as they are written.
        self._turned = np.empty(max(sizes.transposed, num_elements), plan.dtype)

    def write(self, entry: TensorEntry) -> tuple[str, str, int]:
        """The tensor's name, its digest and how many of its values were clipped."""
        rows, width = entry.shape[0], prod(entry.shape[1:])
        row_bytes = width * ITEM_BYTES[entry.dtype]
        places = self._places[entry.name]
        copies, head = places[0].spec.copies, places[0].spec.copied_rows
        # Whole heads where they are copied.
        step = min(rows, max(1, self._raw.size // 4 // width // (copies * head)) * head)
        turned = [place for place in places if place.spec.transpose]
        assert len(turned) <= 1, "the memory for columns is that of one place"
        columns = [_Transposed(place, self._turned, step * copies) for place in turned]
        digest, num_clipped = hashlib.sha256(), 0
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            raw = self._raw[: (stop - start) * row_bytes]
            read_into(entry, start * row_bytes, raw)
            digest.update(raw.data)
            try:
                values, clipped = self._converter.convert(raw, entry.dtype)
            except ValueError:
                raise CheckpointError(
                    f"The tensor {entry.name} of {entry.path.name} holds a value that is not a "
                    "number (NaN); the checkpoint is damaged."
                ) from None
            num_clipped += clipped
            block = _with_copies(values.reshape(stop - start, width), places[0].spec)
            for place in places:
                if not place.spec.transpose:
                    at = place.offset + start * copies * width * values.itemsize
                    _pwrite(self._descriptor, block, at)
            for place_columns in columns:
                place_columns.add(block, self._descriptor)
        return entry.name, digest.hexdigest(), num_clipped


def _check(spec: WeightSpec, entries: Mapping[str, TensorEntry]) -> None:
    if spec.source is None:
        return
    entry = entries.get(spec.source)
    if entry is None:
        quantized = next((name for name in sorted(entries) if _hint(name)), None)
        but = "" if quantized is None else f", but {quantized[:80]}{_hint(quantized)}"
        raise CheckpointError(f"The checkpoint has no tensor {spec.source}{but}.")
    if entry.shape != spec.source_shape:
        raise CheckpointError(
            f"The tensor {entry.name} has the shape {list(entry.shape)}; config.json says "
            f"{list(spec.source_shape)}."
        )
    if entry.dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"The tensor {entry.name} has the type {entry.dtype}; supported: "
            f"{', '.join(ITEM_BYTES)}."
        )


def _hint(name: str) -> str:
    """What a tensor's name says about the checkpoint, as the rest of a sentence."""
    if name.endswith(_QUANTIZED_SUFFIXES):
        return ": its weights are quantized; use the original float weights"
    if ".lora_" in name:
        return ": it holds an adapter; merge it into its base model first"
    return ""


def _with_copies(block: Array, spec: WeightSpec) -> Array:
    if spec.copies == 1:
        return block
    heads = block.reshape(-1, spec.copied_rows, block.shape[1])
    return np.repeat(heads, spec.copies, axis=0).reshape(-1, block.shape[1])


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
