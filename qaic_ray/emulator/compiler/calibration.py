"""Ranges of a model's values, found by running it on inputs; and profiles, which keep them.

A profile is what `-dump-profile` writes and `-load-profile` reads: for each value its smallest and
largest number and a histogram between them.
"""

from __future__ import annotations

import json
import os
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np
import onnxruntime as ort
from google.protobuf.message import EncodeError
from onnx import helper

from ..documents import MAX_NUMBER, parse_mapping, read_text, shown
from ..lowering import graph
from ..lowering.graph import GraphError
from ..lowering.view import ORT_ERRORS
from .configs import ConfigError

Bounds = Tuple[float, float]

METHODS = ("None", "KLMinimization", "KLMinimizationV2", "Percentile", "MSE", "SQNR")
NUM_RANDOM = 8
"""Samples of random data that ranges are found with."""

_NUM_CUTS = 100
_LEVELS = 255
_FEWEST_KL_BINS = 128
_LEAST_SHARE = 1e-4
"""Of a part that keeps nothing where the whole has something; else a rare outlier would decide."""


class Range(NamedTuple):
    """What a value was seen to be: its bounds, and how often in equal parts between them."""

    low: float
    high: float
    counts: Tuple[int, ...] = ()


def samples(
    list_file: Optional[str], random: Optional[str], inputs: Sequence[Any], dims: Mapping[str, Any]
) -> Callable[[], Iterator[Dict[str, Any]]]:
    """Inputs to run a model with, which may be gone through again.

    A line of the list names a raw file for each input, in the model's order, parted by commas.

    Args:
        list_file: the list; None for random data.
        random: `gaussian` or `uniform`.
        inputs: of the model.
        dims: of each of them.

    Raises:
        ConfigError: where the list or a file of it is not what the model takes.
    """
    kinds = {i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in inputs}
    if list_file is None:
        return lambda: _random_samples(random or "gaussian", kinds, dims)
    lines = [line.strip() for line in read_text(list_file, ConfigError).splitlines()]
    rows = [line.split(",") for line in lines if line]
    if not rows:
        raise ConfigError(f"{list_file} names no inputs")
    for row in rows:
        if len(row) != len(kinds):
            raise ConfigError(
                f"{list_file}: a line names {len(row)} files, and the model has {len(kinds)} "
                f"inputs ({', '.join(kinds)}): {shown(','.join(row))}"
            )

    def read() -> Iterator[Dict[str, Any]]:
        for row in rows:
            pairs = zip(kinds, row)
            yield {name: _raw(path.strip(), name, kinds[name], dims[name]) for name, path in pairs}

    return read


def _raw(path: str, name: str, kind: Any, dims: Tuple[int, ...]) -> Any:
    expected = int(np.prod(dims, dtype=np.int64)) * kind.itemsize
    try:
        size = os.path.getsize(path)
        if size != expected:
            raise ConfigError(
                f"{path} has {size} bytes, and input '{name}' of shape {list(dims)} and type "
                f"{kind.name} has {expected}"
            )
        return np.fromfile(path, kind).reshape(dims)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"Failed to open file: {path}: {reason}") from error


def _random_samples(
    law: str, kinds: Mapping[str, Any], dims: Mapping[str, Any]
) -> Iterator[Dict[str, Any]]:
    draw = np.random.default_rng(0)
    for _ in range(NUM_RANDOM):
        sample: Dict[str, Any] = {}
        for name, kind in kinds.items():
            shape = dims[name]
            if kind.kind != "f":
                sample[name] = draw.integers(0, 2, shape).astype(kind)
            elif law == "gaussian":
                sample[name] = draw.standard_normal(shape).astype(kind)
            else:
                sample[name] = draw.uniform(-1, 1, shape).astype(kind)
        yield sample


def observe(
    model: Any,
    names: Sequence[str],
    data: Callable[[], Iterator[Dict[str, Any]]],
    num_bins: int,
) -> Dict[str, Range]:
    """The range of each of these values over all samples, with a histogram of `num_bins`.

    Raises:
        GraphError: where onnxruntime cannot run the model on a sample.
    """
    of_inputs = {i.name for i in graph.inputs(model)}
    made = [name for name in names if name not in of_inputs]
    session = _session(model, made)
    bounds: Dict[str, List[float]] = {name: [np.inf, -np.inf] for name in names}
    for values in _runs(session, made, data):
        for name in names:
            low, high = bounds[name]
            array = values[name]
            if array.size:
                bounds[name] = [min(low, float(array.min())), max(high, float(array.max()))]
    for name, (low, high) in bounds.items():
        if not (np.isfinite(low) and np.isfinite(high)):
            raise GraphError(f"The values of '{name}' have no finite range for these inputs")
    counts = {name: np.zeros(num_bins, np.int64) for name in names}
    for values in _runs(session, made, data):
        for name in names:
            low, high = bounds[name]
            counts[name] += np.histogram(values[name], num_bins, (low, max(high, low + 1e-12)))[0]
    return {
        name: Range(low, high, tuple(counts[name].tolist())) for name, (low, high) in bounds.items()
    }


def _session(model: Any, names: Sequence[str]) -> Any:
    try:
        whole = graph.expand(type(model).FromString(model.SerializeToString()))
    except (EncodeError, ValueError) as error:
        raise GraphError(
            "A model of 2 GiB of weights and more cannot be quantized by this emulated SDK"
        ) from error
    outputs = {output.name for output in whole.graph.output}
    missing = [name for name in names if name not in outputs]
    whole.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in missing)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(
            whole.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except ORT_ERRORS as error:
        raise GraphError(f"The model cannot be run to find its ranges: {error}") from error


def _runs(
    session: Any, made: Sequence[str], data: Callable[[], Iterator[Dict[str, Any]]]
) -> Iterator[Dict[str, Any]]:
    for sample in data():
        try:
            values = session.run(list(made), sample) if made else []
        except ORT_ERRORS as error:
            raise GraphError(f"The model cannot be run on an input of the list: {error}") from error
        yield {**sample, **dict(zip(made, values))}


def bounds_of(seen: Range, method: str, percentile: float) -> Bounds:
    """The part of a range that is worth its levels, by one of the vendor's `METHODS`.

    `MSE` and `SQNR` take the part with the least squared error, which is the same part. How
    `KLMinimizationV2` differs from `KLMinimization` is not public: it is the same here.
    """
    if method == "None" or not any(seen.counts) or seen.low >= seen.high:
        return seen.low, seen.high
    if method == "Percentile":
        return _percentile(seen, percentile)
    error = _divergence if method.startswith("KL") else _squared_error
    centers, counts = _centers(seen), np.array(seen.counts, np.float64)
    cuts = [i / _NUM_CUTS for i in range(_NUM_CUTS // 4, _NUM_CUTS + 1)]
    parts = [(seen.low * cut, seen.high * cut) for cut in cuts]
    return min(reversed(parts), key=lambda part: error(centers, counts, part))


def _centers(seen: Range) -> Any:
    edges = np.linspace(seen.low, seen.high, len(seen.counts) + 1)
    return (edges[:-1] + edges[1:]) / 2


def _percentile(seen: Range, percentile: float) -> Bounds:
    """The bounds between which `percentile` per cent of the values are, the rest shared out."""
    counts = np.array(seen.counts, np.float64)
    share = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    edges = np.linspace(seen.low, seen.high, len(counts) + 1)
    outside = (1 - percentile / 100) / 2
    low = edges[np.searchsorted(share, outside, "right") - 1] if outside else seen.low
    high = edges[np.searchsorted(share, 1 - outside, "left")] if outside else seen.high
    return float(low), float(high)


def _squared_error(centers: Any, counts: Any, part: Bounds) -> float:
    step = max(part[1] - part[0], 1e-30) / _LEVELS
    rounded = np.clip(np.round((centers - part[0]) / step), 0, _LEVELS) * step + part[0]
    return float((counts * (centers - rounded) ** 2).sum())


def _divergence(centers: Any, counts: Any, part: Bounds) -> float:
    """Kullback-Leibler divergence of a histogram from what its part's 8-bit levels keep of it."""
    inside = (centers >= part[0]) & (centers <= part[1])
    if inside.sum() < min(_FEWEST_KL_BINS, len(counts)):
        return float("inf")
    kept = counts[inside].copy()
    kept[0] += counts[centers < part[0]].sum()
    kept[-1] += counts[centers > part[1]].sum()
    levels = np.minimum(np.arange(len(kept)) * (_LEVELS + 1) // len(kept), _LEVELS)
    used = kept > 0
    sums = np.bincount(levels, counts[inside], _LEVELS + 1)
    numbers = np.bincount(levels, used, _LEVELS + 1)
    spread = np.where(used, sums[levels] / np.maximum(numbers[levels], 1), 0.0)
    p, q = kept[used] / kept.sum(), np.maximum(spread[used] / kept.sum(), _LEAST_SHARE)
    return float((p * np.log(p / (q / q.sum()))).sum())


def _range(row: Mapping[str, Any]) -> Range:
    found = Range(float(row["Min"]), float(row["Max"]), tuple(int(n) for n in row["Histogram"]))
    if not (_is_number(found.low) and _is_number(found.high) and found.low <= found.high):
        raise ValueError("bounds")
    if not all(0 <= count <= MAX_NUMBER for count in found.counts):
        raise ValueError("Histogram")
    return found


def _is_number(value: float) -> bool:
    return bool(abs(value) <= np.finfo(np.float32).max)


def write_profile(path: str, ranges: Mapping[str, Range]) -> None:
    """Keep ranges in a file, which is JSON and so YAML."""
    profiles = [
        {"NodeOutputName": name, "Min": seen.low, "Max": seen.high, "Histogram": list(seen.counts)}
        for name, seen in ranges.items()
    ]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"NodeProfiles": profiles}, file)
        file.write("\n")


def read_profile(path: str) -> Dict[str, Range]:
    """The ranges of a profile.

    Raises:
        ConfigError: where it is none.
    """
    document = parse_mapping(read_text(path, ConfigError), path, ConfigError)
    try:
        return {str(row["NodeOutputName"]): _range(row) for row in document["NodeProfiles"]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{path} is not a quantization profile of -dump-profile ({error!r:.80})"
        ) from error
