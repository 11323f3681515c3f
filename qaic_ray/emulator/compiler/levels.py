"""The 256 levels that int8 puts numbers on: of a range, of a weight, and in a graph."""

from __future__ import annotations

from typing import Any, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
from onnx import helper, numpy_helper

from ..container.constants import to_float32

ASYMMETRIC = "asymmetric"
UINT8_WHERE_POSITIVE = "symmetric_with_uint8"
POWER_OF_TWO = "symmetric_with_power2_scale"

_PIECE = 1 << 22
"""Numbers of a weight that are put on their levels at once."""


class Grid(NamedTuple):
    """Levels: `value = scale * (level - zero_point)`, for a tensor or for each of its channels."""

    scale: Any
    zero_point: Any

    @property
    def limits(self) -> Tuple[int, int]:
        """The lowest and the highest level."""
        info = np.iinfo(self.zero_point.dtype)
        return int(info.min), int(info.max)

    def levels(self, values: Any, axis: Optional[int]) -> Any:
        """The nearest level of each value; `axis` is that of the channels."""
        scale, zero = self.scale, self.zero_point.astype(np.int64)
        if axis is not None:
            shape = [1] * values.ndim
            shape[axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        rounded = np.round(values.astype(np.float64) / scale) + zero
        return np.clip(rounded, *self.limits).astype(self.zero_point.dtype)


def grid_of(low: Any, high: Any, schema: str) -> Grid:
    """The int8 levels of a range by a schema; zero is always one of them.

    Args:
        low: of the values, a number or one a channel.
        high: likewise.
        schema: the vendor's word.
    """
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    tiny = np.finfo(np.float32).tiny * 256
    if schema == ASYMMETRIC:
        scale = np.maximum((high - low) / 255, tiny)
        zero = np.clip(np.round(-128 - low / scale), -128, 127).astype(np.int8)
    elif schema == UINT8_WHERE_POSITIVE and np.all(low >= 0):
        scale = np.maximum(high / 255, tiny)
        zero = np.zeros(scale.shape, np.uint8)
    else:
        scale = np.maximum(np.maximum(-low, high) / 127, tiny)
        if schema == POWER_OF_TWO:
            scale = np.exp2(np.ceil(np.log2(scale)))
        zero = np.zeros(scale.shape, np.int8)
    return Grid(scale.astype(np.float32), zero)


def grid_of_offsets(scale: Any, offset: Any) -> Grid:
    """Levels in AIMET's words: `value = scale * (level + offset)`, level 0 to 255."""
    return Grid(np.asarray(scale, np.float32), (-128 - np.asarray(offset)).astype(np.int8))


def _pieces(array: Any, kind: int) -> Iterator[Tuple[slice, Any]]:
    """Parts of an array along its first axis, as float32: a whole weight may be large."""
    if not array.ndim:
        yield slice(None), to_float32(array[np.newaxis], kind)
        return
    at_once = max(1, _PIECE // max(1, array[:1].size))
    for first in range(0, len(array), at_once):
        rows = slice(first, first + at_once)
        yield rows, to_float32(array[rows], kind)


def extremes(array: Any, kind: int, axis: Optional[int]) -> Tuple[Any, Any]:
    """The smallest and the largest number, of all or of each channel along `axis`."""
    if not array.size:
        return 0.0, 0.0
    over = None if axis is None else tuple(i for i in range(array.ndim) if i != axis)
    parts = [(values.min(over), values.max(over)) for _, values in _pieces(array, kind)]
    lows, highs = ([part[i] for part in parts] for i in (0, 1))
    if axis == 0:
        return np.concatenate(lows), np.concatenate(highs)
    return np.min(lows, 0), np.max(highs, 0)


def levels_of(array: Any, kind: int, grid: Grid, axis: Optional[int]) -> Any:
    """`Grid.levels` of a weight, piece by piece."""
    levels = np.empty(array.shape, grid.zero_point.dtype)
    rows_of = levels if levels.ndim else levels[np.newaxis]
    for rows, values in _pieces(array, kind):
        own = Grid(grid.scale[rows], grid.zero_point[rows]) if axis == 0 else grid
        rows_of[rows] = own.levels(values, axis)
    return levels


class Rewriter:
    """A graph whose nodes are made anew, some values on grids."""

    def __init__(self, model_graph: Any) -> None:
        self.graph = model_graph
        self.nodes: List[Any] = []

    def replace_nodes(self) -> None:
        """Put the new nodes in place of the old ones."""
        copies = [type(node).FromString(node.SerializeToString()) for node in self.nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)

    def store(self, made: str, levels: Any, grid: Grid, axis: Optional[int]) -> None:
        """`made` is what these levels of a weight mean."""
        initializers = self.graph.initializer
        initializers.append(numpy_helper.from_array(levels, f"{made}/levels"))
        initializers.append(numpy_helper.from_array(grid.scale, f"{made}/scale"))
        initializers.append(numpy_helper.from_array(grid.zero_point, f"{made}/zero"))
        names = [f"{made}/{part}" for part in ("levels", "scale", "zero")]
        more = {} if axis is None else {"axis": axis}
        self.nodes.append(helper.make_node("DequantizeLinear", names, [made], **more))

    def add_grid(self, source: str, target: str, grid: Grid) -> None:
        """`target` is `source` on its grid."""
        initializers = self.graph.initializer
        initializers.append(numpy_helper.from_array(grid.scale, f"{target}/scale"))
        initializers.append(numpy_helper.from_array(grid.zero_point, f"{target}/zero"))
        with_grid = [f"{target}/scale", f"{target}/zero"]
        levels = f"{target}/levels"
        self.nodes.append(helper.make_node("QuantizeLinear", [source, *with_grid], [levels]))
        self.nodes.append(helper.make_node("DequantizeLinear", [levels, *with_grid], [target]))
