"""Ranges of a model's values, found by running it on inputs; and profiles, which keep them.

A profile is what `-dump-profile` writes and `-load-profile` reads: for each value its smallest and
largest number and a histogram between them.
"""

from __future__ import annotations

import contextlib
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
from onnx import TensorProto, helper, numpy_helper

from ..container.constants import to_float32
from ..documents import MAX_NUMBER, parse_mapping, read_text, shown
from ..lowering import graph
from ..lowering.graph import FLOATS, GraphError
from ..lowering.view import ORT_ERRORS
from .configs import ConfigError
from .weights import Precision, WeightFiles, round_constant

Bounds = Tuple[float, float]

METHODS = ("None", "KLMinimization", "KLMinimizationV2", "Percentile", "MSE", "SQNR")
NUM_RANDOM = 8
"""Samples of random data that ranges are found with."""

_NUM_CUTS = 100
_LEVELS = 255
_FEWEST_KL_BINS = 128
_LEAST_SHARE = 1e-4
"""Of a part that keeps nothing where the whole has something; else a rare outlier would decide."""

_VENDORS_MARK = "GlowToolsVersion:"


class _Observed(NamedTuple):
    """A session of a model, and the arrays of its weights, which it takes as inputs."""

    session: Any
    weights: Dict[str, Any]


class Range(NamedTuple):
    """What a value was seen to be: its bounds, and how often in equal parts between them."""

    low: float
    high: float
    counts: Tuple[int, ...] = ()


def samples(
    list_file: Optional[str], random: Optional[str], inputs: Sequence[Any], dims: Mapping[str, Any]
) -> Callable[[], Iterator[Dict[str, Any]]]:
    """Inputs to run a model with, which may be gone through again; floating point as float32.

    A line of the list names a raw file for each input, in the model's order and type, parted by
    commas.

    Args:
        list_file: the list; None for random data.
        random: `gaussian` or `uniform`.
        inputs: of the model.
        dims: of each of them.

    Raises:
        ConfigError: where the list or a file of it is not what the model takes.
    """
    kinds = {i.name: i.type.tensor_type.elem_type for i in inputs}
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


def _raw(path: str, name: str, kind: int, dims: Tuple[int, ...]) -> Any:
    dtype = _stored(kind)
    expected = int(np.prod(dims, dtype=np.int64)) * dtype.itemsize
    try:
        size = os.path.getsize(path)
        if size != expected:
            raise ConfigError(
                f"{path} has {size} bytes, and input '{name}' of shape {list(dims)} and type "
                f"{_name(kind)} has {expected}"
            )
        array = np.fromfile(path, dtype).reshape(dims)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"Failed to open file: {path}: {reason}") from error
    return to_float32(array, kind) if kind in FLOATS else array


def _stored(kind: int) -> Any:
    """The dtype that an ONNX type is read as; bfloat16 is read as uint16."""
    bfloat = kind == TensorProto.BFLOAT16
    return np.dtype(np.uint16) if bfloat else helper.tensor_dtype_to_np_dtype(kind)


def _name(kind: int) -> str:
    return "bfloat16" if kind == TensorProto.BFLOAT16 else str(_stored(kind).name)


def _random_samples(
    law: str, kinds: Mapping[str, int], dims: Mapping[str, Any]
) -> Iterator[Dict[str, Any]]:
    draw = np.random.default_rng(0)
    for _ in range(NUM_RANDOM):
        sample: Dict[str, Any] = {}
        for name, kind in kinds.items():
            shape = dims[name]
            if kind not in FLOATS:
                sample[name] = draw.integers(0, 2, shape).astype(_stored(kind))
            elif law == "gaussian":
                sample[name] = draw.standard_normal(shape).astype(np.float32)
            else:
                sample[name] = draw.uniform(-1, 1, shape).astype(np.float32)
        yield sample


def observe(
    model: Any,
    files: WeightFiles,
    names: Sequence[str],
    data: Callable[[], Iterator[Dict[str, Any]]],
    *,
    num_bins: int,
) -> Dict[str, Range]:
    """The range of each of these values over all samples, with a histogram of `num_bins`.

    The model runs in float32. Its weights stay where they are: in it, or mapped from their files.

    Raises:
        ConstantError, ExternalDataError: where a weight cannot be read.
        GraphError: where onnxruntime cannot run the model on a sample.
    """
    of_inputs = {i.name for i in graph.inputs(model)}
    made = [name for name in names if name not in of_inputs]
    session = _session(model, files, made)
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
            if low < high:
                # In float64: float32 has too few numbers between near bounds for their bins.
                wide = values[name].astype(np.float64)
                counts[name] += np.histogram(wide, num_bins, (low, high))[0]
            else:
                counts[name][0] += values[name].size
    return {
        name: Range(low, high, tuple(counts[name].tolist())) for name, (low, high) in bounds.items()
    }


def _session(model: Any, files: WeightFiles, names: Sequence[str]) -> _Observed:
    whole, weights = _in_float32(model, files)
    whole = graph.expand(whole)
    outputs = {output.name for output in whole.graph.output}
    missing = [name for name in names if name not in outputs]
    whole.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in missing)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    try:
        session = ort.InferenceSession(
            whole.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except ORT_ERRORS as error:
        raise GraphError(f"The model cannot be run to find its ranges: {error}") from error
    return _Observed(session, weights)


def _in_float32(model: Any, files: WeightFiles) -> Tuple[Any, Dict[str, Any]]:
    """A copy of a model that computes in float32, and the arrays of its weights.

    Its weights are inputs: onnxruntime would make copies of initializers, and reads inputs where
    they are. float16 weights stay what they are, and are widened one by one while the copy runs.
    """
    copy = graph.structure(model)
    stubs = list(copy.graph.initializer)
    del copy.graph.initializer[:]
    del copy.graph.input[:]
    copy.graph.input.extend(graph.inputs(model))
    graph.widen_to_float32(copy)
    nodes: List[Any] = []
    weights: Dict[str, Any] = {}
    for stub, tensor in zip(stubs, model.graph.initializer):
        name, kind, array = tensor.name, tensor.data_type, files.open(tensor)
        is_narrow = kind in FLOATS and kind != TensorProto.FLOAT
        if stub.data_location != TensorProto.EXTERNAL:
            values = to_float32(array, kind) if is_narrow else array
            copy.graph.initializer.append(numpy_helper.from_array(values, name))
            continue
        source = f"{name}/stored" if is_narrow else name
        if is_narrow:
            nodes.append(helper.make_node("Cast", [source], [name], to=TensorProto.FLOAT))
        if kind == TensorProto.BFLOAT16:  # numpy has no such type to hand it over in
            kind, array = TensorProto.FLOAT, to_float32(array, kind)
        copy.graph.input.append(helper.make_tensor_value_info(source, kind, tensor.dims))
        weights[source] = array
    for node in copy.graph.node:
        round_constant(node, Precision(convert_to_fp16=False, mxfp6_matmul=False))
    nodes += list(copy.graph.node)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy, weights


def _runs(
    observed: _Observed, made: Sequence[str], data: Callable[[], Iterator[Dict[str, Any]]]
) -> Iterator[Dict[str, Any]]:
    for sample in data():
        feeds = {**observed.weights, **sample}
        try:
            values = observed.session.run(list(made), feeds) if made else []
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
    """Keep ranges in a file, which is JSON and so YAML; whole or not at all.

    Raises:
        ConfigError: where it cannot be written.
    """
    profiles = [
        {"NodeOutputName": name, "Min": seen.low, "Max": seen.high, "Histogram": list(seen.counts)}
        for name, seen in ranges.items()
    ]
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ConfigError(f"Failed to open file: {path}: it is not a file")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"NodeProfiles": profiles}, file)
            file.write("\n")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"Failed to open file: {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(temporary)


def read_profile(path: str) -> Dict[str, Range]:
    """The ranges of a profile.

    Raises:
        ConfigError: where it is none.
    """
    text = read_text(path, ConfigError)
    if _VENDORS_MARK in text:
        raise ConfigError(
            f"{path} is a profile of the vendor's compiler, whose names are those of a graph of "
            "its own: make one here, of the same inputs, with -dump-profile"
        )
    document = parse_mapping(text, path, ConfigError)
    try:
        return {str(row["NodeOutputName"]): _range(row) for row in document["NodeProfiles"]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{path} is not a quantization profile of -dump-profile ({error!r:.80})"
        ) from error
