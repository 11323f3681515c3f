"""Two bundles beside each other: the first execution, tensor and element in which they differ.

A bundle is what `--record` left, or a folder of outputs that `qaic-runner` wrote; the types of the
latter are those of the bundle beside it. A bundle has the executions of one activation, outputs
those of as many as `qaic-runner -a` asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray.bundles.record import BATCH_FILE, FACTS_FILE
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import checked, parse_json, read_object, read_text, shown
from qaic_ray.files.folders import inside

MAX_BATCH_BYTES = 256 << 20
"""Of a file of the batch form."""

_OUTPUT = re.compile(
    r"(?P<name>.+)-activation-(?P<activation>[0-9]{1,9})-inf-(?P<number>[0-9]{1,9})\.bin", re.ASCII
)
_BY_SIZE = {1: "int8", 2: "float16", 4: "float32", 8: "int64"}
"""What an element of so many bytes is taken for, where nothing says it."""
_WORDS = {"in": "input", "out": "output"}
_GIVE = "give a bundle of `qaic-ray run --record`, or a folder of outputs of qaic-runner"
_MAX_DIM = 1 << 40
_MAX_RANK = 32
_MAX_EXECUTIONS = 1_000_000
_KINDS = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """Where two bundles differ first; `element` is an index of the tensor, None for all of it.

    `activation` is None where the bundles have one each.
    """

    activation: int | None
    execution: int
    direction: str
    tensor: str
    element: tuple[int, ...] | None
    first: str
    second: str

    @property
    def text(self) -> str:
        """A sentence."""
        where = f"execution {self.execution}, {self.direction} {self.tensor}"
        if self.activation is not None:
            where = f"activation {self.activation}, {where}"
        if self.element is not None:
            where += f" at {list(self.element)}"
        return f"{where}: {self.first} and {self.second}"


@dataclass(frozen=True)
class BundleComparison:
    """What came of a comparison; `largest` is the largest difference of numbers up to there."""

    executions: int
    largest: float
    difference: Difference | None


@dataclass(frozen=True)
class _Tensor:
    direction: str
    name: str
    path: Path
    dims: tuple[int, ...] | None = None
    size: int | None = None


_Execution = dict[tuple[str, str], _Tensor]


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: tensors of each activation's executions, and types by name, where known."""

    folder: Path
    activations: Mapping[int, list[_Execution]]
    dtypes: Mapping[str, str]
    has_inputs: bool

    @property
    def executions(self) -> list[_Execution]:
        """Those of all activations, one after the other."""
        return [execution for each in self.activations.values() for execution in each]


@dataclass(frozen=True)
class _Facts:
    dtypes: dict[str, str] = field(default_factory=dict)


def read_bundle(path: Path) -> Bundle:
    """Read a bundle's list of files; the files are read when they are compared.

    Args:
        path: a folder with `aic_batch_io.json`, that file itself, or a folder of outputs.

    Raises:
        UsageError: it is none, or malformed.
    """
    if not path.exists():
        raise UsageError(f"{path} is not there: {_GIVE}.")
    batch = path / BATCH_FILE if path.is_dir() else path
    if path.is_dir() and not batch.exists():
        return _outputs(path)
    rows = _rows(batch)
    facts = batch.with_name(FACTS_FILE)
    dtypes = checked(_Facts, read_object(facts), str(facts)).dtypes if facts.is_file() else {}
    for name, kind in dtypes.items():
        if kind not in _KINDS:
            raise UsageError(f"{facts} says that {shown(name)} is {shown(kind)}, which is no type.")
    executions = []
    for number, row in enumerate(rows):
        found: _Execution = {}
        for item in row:
            tensor = _tensor(batch, number, item)
            if (tensor.direction, tensor.name) in found:
                raise UsageError(f"{batch} has {shown(tensor.name)} twice in execution {number}.")
            found[tensor.direction, tensor.name] = tensor
        executions.append(found)
    return Bundle(batch.parent, {0: executions}, dtypes, has_inputs=True)


def _rows(batch: Path) -> list[list[dict[str, Any]]]:
    """The files of each execution."""
    document = parse_json(read_text(batch, max_bytes=MAX_BATCH_BYTES), str(batch))
    if not isinstance(document, dict) or "IO-files" not in document:
        raise UsageError(f"{batch} is no bundle, since it has no IO-files: {_GIVE}.")
    try:
        return checked(list[list[dict[str, Any]]], document["IO-files"], f"{batch}: IO-files")
    except UsageError as error:
        raise UsageError(f"{str(error).rstrip('.')}: {_GIVE}.") from error


def _tensor(batch: Path, number: int, item: Mapping[str, Any]) -> _Tensor:
    where = f"{batch}, execution {number}"
    path, direction, name = (item.get(key) for key in ("path", "io-direction", "map-to"))
    if direction not in ("in", "out") or not isinstance(name, str) or not name:
        raise UsageError(
            f"{where}: a file needs io-direction (in or out) and map-to, not {shown(direction)} "
            f"and {shown(name)}."
        )
    if not isinstance(path, str) or not path:
        raise UsageError(f"{where}: {shown(name)} needs the path of a file, not {shown(path)}.")
    dims, size = item.get("dims"), item.get("elem-size")
    if dims is not None and not (
        isinstance(dims, list)
        and len(dims) <= _MAX_RANK
        and all(type(d) is int and 0 <= d <= _MAX_DIM for d in dims)
    ):
        raise UsageError(f"{where}: dims of {shown(name)} must be numbers, not {shown(dims)}.")
    if size is not None and (type(size) is not int or size not in _BY_SIZE):
        raise UsageError(f"{where}: elem-size of {shown(name)} is {shown(size)}, not 1, 2, 4 or 8.")
    try:
        place = batch.parent / inside(path)
    except ValueError as error:
        raise UsageError(f"{where}: {shown(name)} has {shown(path)}: {error}.") from error
    return _Tensor(direction, name, place, None if dims is None else tuple(dims), size)


def _outputs(folder: Path) -> Bundle:
    found: dict[int, dict[int, _Execution]] = {}
    for path in sorted(folder.iterdir()):
        match = _OUTPUT.fullmatch(path.name)
        if match is not None:
            name, activation = match["name"], int(match["activation"])
            tensors = found.setdefault(activation, {}).setdefault(int(match["number"]), {})
            tensors["out", name] = _Tensor("out", name, path)
    if not found:
        raise UsageError(
            f"{folder} is no bundle: it has neither {BATCH_FILE} nor outputs of qaic-runner "
            "(NAME-activation-0-inf-0.bin); make one with `qaic-ray run --record 10`."
        )
    last = max(map(max, found.values()))
    if last >= _MAX_EXECUTIONS:
        raise UsageError(f"{folder} has an execution {last}; at most {_MAX_EXECUTIONS} are read.")
    activations = {
        activation: [
            found[activation].get(number, {}) for number in range(max(found[activation]) + 1)
        ]
        for activation in sorted(found)
    }
    return Bundle(folder, activations, {}, has_inputs=False)


def compare_bundles(
    first: Bundle, second: Bundle, *, tolerance: float | None = None
) -> BundleComparison:
    """Compare two bundles, execution by execution: inputs where both have them, then outputs.

    Args:
        first: a bundle.
        second: the other one; what only one of them has, of inputs too, is a difference.
        tolerance: how far numbers may be apart, absolutely and as a share of the second's; None:
            no bit may differ.

    Raises:
        UsageError: a file cannot be read, or is not as long as its dims say; a folder of outputs
            lacks those of an execution that the other bundle has; or the two have not the same
            activations.
    """
    executions, largest = 0, 0.0
    for activation, sides in _activations(first, second):
        found = _compare(activation, sides, tolerance)
        executions, largest = executions + found.executions, max(largest, found.largest)
        if found.difference is not None:
            return BundleComparison(executions, largest, found.difference)
    return BundleComparison(executions, largest, None)


def _activations(first: Bundle, second: Bundle) -> Iterator[tuple[int | None, tuple[_Side, _Side]]]:
    """What is compared with each other: executions of one activation of both bundles.

    Raises:
        UsageError: one has an activation that the other has not. Which execution of a batch such
            a one had is not told by any file.
    """
    several = [len(bundle.activations) > 1 for bundle in (first, second)]
    if not any(several):
        (one,), (other,) = first.activations.values(), second.activations.values()
        yield None, (_Side(first, one), _Side(second, other))
        return
    if first.activations.keys() != second.activations.keys():
        more, less = (first, second) if several[0] else (second, first)
        if not less.has_inputs and not more.has_inputs:
            remedy = "run qaic-runner with one -a for both, into new folders"
        else:
            remedy = "run qaic-runner again without -a, into a new folder"
        raise UsageError(
            f"{more.folder} has outputs of activations {_listed(more)}, and {less.folder} those of "
            f"{_listed(less)}: {remedy}."
        )
    for activation, executions in first.activations.items():
        sides = _Side(first, executions), _Side(second, second.activations[activation])
        yield activation, sides


def _listed(bundle: Bundle) -> str:
    return ", ".join(map(str, bundle.activations))


@dataclass(frozen=True)
class _Side:
    """One activation of a bundle."""

    bundle: Bundle
    executions: list[_Execution]


def _compare(
    activation: int | None, sides: tuple[_Side, _Side], tolerance: float | None
) -> BundleComparison:
    """Two activations beside each other."""
    both = all(side.bundle.has_inputs for side in sides)
    directions = ("in", "out") if both else ("out",)
    largest = 0.0
    num_executions = max(len(side.executions) for side in sides)
    for number in range(num_executions):
        _check_written(sides, activation, number, num_executions)
        if any(number >= len(side.executions) for side in sides):
            break
        for direction in directions:
            names = [_names(side.executions[number], direction) for side in sides]
            for name in dict.fromkeys([*names[0], *names[1]]):
                where = (activation, number, _WORDS[direction], name)
                missing = [
                    side.bundle.folder
                    for side, known in zip(sides, names, strict=True)
                    if name not in known
                ]
                if missing:
                    gone = Difference(*where, None, "there", f"{missing[0]} has none")
                    return BundleComparison(number, largest, gone)
                tensors = [known[name] for known in names]
                arrays = [_array(tensor, tensors, sides) for tensor in tensors]
                apart, place = _first_apart(arrays[0], arrays[1], tolerance)
                largest = max(largest, apart)
                if place is not None:
                    return BundleComparison(number, largest, _difference(where, arrays, place))
    counts = [len(side.executions) for side in sides]
    if counts[0] != counts[1]:
        said = [f"{count} executions" for count in counts]
        ends = Difference(activation, min(counts), "number of", "executions", None, *said)
        return BundleComparison(min(counts), largest, ends)
    return BundleComparison(counts[0], largest, None)


def _check_written(
    sides: tuple[_Side, _Side], activation: int | None, number: int, num_executions: int
) -> None:
    """Refuse a folder of outputs that has none of an execution of the other bundle.

    Whatever asks `qaic-runner` for outputs and no number gets those of one execution.
    """
    of_which = "" if activation is None else f" of activation {activation}"
    for side in sides:
        if not side.bundle.has_inputs and not any(side.executions[number : number + 1]):
            raise UsageError(
                f"{side.bundle.folder} has no outputs of execution {number}{of_which}, and the "
                f"other bundle has {num_executions} executions: run qaic-runner again with "
                f"--write-output-num-samples {num_executions}, without --write-output-start-iter."
            )


def _names(tensors: _Execution, direction: str) -> dict[str, _Tensor]:
    # Files of qaic-runner have `_` for the slashes of a name.
    return {
        name.replace("/", "_"): tensor
        for (kind, name), tensor in tensors.items()
        if kind == direction
    }


def _array(tensor: _Tensor, pair: list[_Tensor], sides: tuple[_Side, _Side]) -> Array:
    """A tensor's values; what it does not say of itself is taken from the other one."""
    said = [side.bundle.dtypes.get(t.name) for side, t in zip(sides, pair, strict=True)]
    own = said[pair.index(tensor)]
    sizes = [t.size for t in (tensor, *pair) if t.size is not None]
    kind = np.dtype(own or next(filter(None, said), None) or _BY_SIZE[sizes[0] if sizes else 4])
    try:
        data = tensor.path.read_bytes() if tensor.path.is_file() else None
    except OSError as error:
        raise UsageError(f"{tensor.path} cannot be read: {error.strerror}.") from error
    if data is None and tensor.direction == "out":
        raise UsageError(
            f"{tensor.path} is not there, or is not a file: a bundle that was made without running "
            "the program has no outputs; replay it with qaic-runner, and compare what that writes."
        )
    if data is None:
        raise UsageError(f"{tensor.path} is not there, or is not a file.")
    dims = tensor.dims or next((t.dims for t in pair if t.dims is not None), None)
    if dims is None and len(data) % kind.itemsize == 0:
        dims = (len(data) // kind.itemsize,)
    if dims is None or len(data) != prod(dims) * kind.itemsize:
        shape = "whole elements" if dims is None else f"{list(dims)}"
        raise UsageError(f"{tensor.path} has {len(data)} bytes, which is not {shape} of {kind}.")
    return np.frombuffer(data, kind).reshape(dims)


def _first_apart(
    first: Array, second: Array, tolerance: float | None
) -> tuple[float, tuple[int, ...] | None]:
    """The largest difference of numbers, and the first element that differs too much."""
    if first.shape != second.shape or (tolerance is None and first.dtype != second.dtype):
        return 0.0, ()
    with np.errstate(invalid="ignore", over="ignore"):
        left, right = first.astype(np.float64), second.astype(np.float64)
        apart = np.abs(left - right)
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        apart = np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))
        if tolerance is None:
            bits = f"u{first.dtype.itemsize}"
            wrong = first.view(bits) != second.view(bits)
        else:
            wrong = ~same & ~(apart <= tolerance + tolerance * np.abs(right))
    flat = np.flatnonzero(wrong)
    largest = float(apart.max(initial=0.0))
    if not flat.size:
        return largest, None
    place = np.unravel_index(int(flat[0]), first.shape)
    return largest, tuple(int(index) for index in place)


def _difference(
    where: tuple[int | None, int, str, str], arrays: list[Array], place: tuple[int, ...]
) -> Difference:
    first, second = (f"{a.dtype} {list(a.shape)}" for a in arrays)
    if first != second and not place:
        return Difference(*where, None, first, second)
    first, second = (_value(array[place]) for array in arrays)
    if first == second:  # such as two NaNs of other bits
        bits = [array[place].tobytes()[::-1].hex() for array in arrays]
        first, second = f"{first} (0x{bits[0]})", f"{second} (0x{bits[1]})"
    return Difference(*where, place, first, second)


def _value(value: Any) -> str:
    return repr(value.item()) if value.dtype.kind != "f" else str(value)
