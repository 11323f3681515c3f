"""Where the inputs of `qaic-runner` come from: files, a JSON of them, or a random generator.

A batch is what one inference is given, and maybe the outputs that are expected of it. Batches are
read when they are needed and kept while they fit in the memory that is allowed.
"""

from __future__ import annotations

import math
import os
import stat
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..container.netdesc import Binding
from ..documents import parse_json, read_text, shown
from ..qaic.hosting import HostedProgram
from ..qaic.session import bounded_random
from .argv import RunnerError, RunnerOptions

Arrays = Dict[str, np.ndarray]

_SEED = 0
_MIB = 1 << 20
_MAX_DIM = 1 << 40


class IoFile(NamedTuple):
    """A file of one input or output; `dims` is None where only its size tells them."""

    path: str
    dims: Optional[Tuple[int, ...]]


class Batch(NamedTuple):
    """What one inference is given, and what is expected of it."""

    inputs: Arrays
    expected: Arrays


class Source:
    """The batches, in turn and again from the first.

    Attributes:
        count: how many there are.
        is_random: whether the values are random.
        outputs: names of outputs that a batch expects.
    """

    def __init__(
        self,
        host: HostedProgram,
        entries: Sequence[Tuple[Mapping[str, IoFile], Mapping[str, IoFile]]],
        options: RunnerOptions,
    ) -> None:
        self.count = max(1, len(entries))
        self.is_random = not entries
        self.outputs = {name for _, expected in entries for name in expected}
        self._host = host
        self._entries = list(entries)
        self._options = options
        self._kept: Dict[int, Batch] = {}
        self._spare_bytes = options.batch_memory_mb * _MIB

    def batch(self, index: int) -> Batch:
        """The batch of inference `index`.

        Raises:
            RunnerError: where a file cannot be read or does not fit.
        """
        place = index % self.count
        kept = self._kept.get(place)
        if kept is None:
            kept = Batch(self._random(), {}) if self.is_random else self._read(place)
            size = sum(a.nbytes for arrays in kept for a in arrays.values())
            if size <= self._spare_bytes:
                self._spare_bytes -= size
                self._kept[place] = kept
        return kept

    def _random(self) -> Arrays:
        generator = np.random.default_rng(_SEED)
        made = {}
        shapes = self._host.specializations()[0]
        for binding in self._host.inputs:
            if binding.name in self._host.states:
                continue  # it stays on the device
            dims = shapes[binding.name]
            if self._options.unbound_random:
                size = math.prod(dims) * binding.dtype.itemsize
                made[binding.name] = np.frombuffer(generator.bytes(size), binding.dtype).reshape(
                    dims
                )
            else:
                made[binding.name] = bounded_random(binding, dims, generator)
        return made

    def _read(self, place: int) -> Batch:
        given, expected = self._entries[place]
        host = self._host
        raw = {name: _content(file.path) for name, file in given.items()}
        raw = {name: data for name, data in raw.items() if data.size}
        first = host.specializations()[0]
        dims = self._dims(given, raw)
        if dims is None and self._options.auto_batch:
            raw = {name: self._repeated(name, data) for name, data in raw.items()}
            dims = self._dims(given, raw)
        inputs = {}
        for binding in host.inputs:
            name = binding.name
            if name in raw:
                shape = dims[name] if dims is not None else given[name].dims or first[name]
                inputs[name] = _shaped(binding, raw[name], shape, given[name].path)
        try:
            inputs = host.checked(inputs)
            host.shapes(inputs)
        except ValueError as error:
            raise RunnerError(str(error)) from error
        wanted: Arrays = {}
        if self._options.compares:
            types = {b.name: b.dtype for b in host.outputs}
            for name, file in expected.items():
                data = _content(file.path)
                if data.size % types[name].itemsize:
                    raise RunnerError(f"{file.path} does not hold elements of {types[name]}")
                wanted[name] = data.view(types[name])
        return Batch(inputs, wanted)

    def _dims(
        self, given: Mapping[str, IoFile], raw: Mapping[str, np.ndarray]
    ) -> Optional[Dict[str, Tuple[int, ...]]]:
        """Dims of a specialization that has the dims, else the sizes, of the files; None: none."""
        itemsize = {b.name: b.dtype.itemsize for b in self._host.inputs}
        for entry in self._host.specializations():
            if all(
                given[name].dims == entry[name]
                if given[name].dims is not None
                else data.size == math.prod(entry[name]) * itemsize[name]
                for name, data in raw.items()
            ):
                return entry
        return None

    def _repeated(self, name: str, data: np.ndarray) -> np.ndarray:
        """The input of one row again and again, as the program's batch size wants it."""
        binding = next(b for b in self._host.inputs if b.name == name)
        rows = binding.dims[0] if binding.dims else 1
        return np.tile(data, rows) if data.size * rows == binding.size else data


def _shaped(binding: Binding, data: np.ndarray, dims: Tuple[int, ...], path: str) -> np.ndarray:
    expected = math.prod(dims) * binding.dtype.itemsize
    if data.size != expected:
        raise RunnerError(
            f"Input file {path} has {data.size} bytes; input '{binding.name}' of "
            f"{list(dims)} {binding.dtype} takes {expected}"
        )
    return data.view(binding.dtype).reshape(dims)


def _content(path: str) -> np.ndarray:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RunnerError(f"Failed to open file: {path}: it is not a file")
        return np.fromfile(path, np.uint8)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunnerError(f"Failed to open file: {path}: {reason}") from error


def open_source(host: HostedProgram, options: RunnerOptions) -> Source:
    """The batches that the command line asks for.

    Raises:
        RunnerError: where a file cannot be read, or does not fit the program.
    """
    entries: List[Tuple[Dict[str, IoFile], Dict[str, IoFile]]] = []
    if options.input_files:
        entries = [(_in_order(host, options.input_files), {})]
    elif options.batch_json:
        entries = _from_json(host, options.batch_json)
    elif options.batch_directory:
        entries = [(_in_order(host, [path]), {}) for path in _files_of(options.batch_directory)]
    elif options.batch_file_list:
        text = read_text(options.batch_file_list, RunnerError)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        entries = [(_in_order(host, line.split(",")), {}) for line in lines]
        if not entries:
            raise RunnerError(f"{options.batch_file_list} names no files")
    return Source(host, entries, options)


def _files_of(folder: str) -> List[str]:
    try:
        paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    except OSError as error:
        raise RunnerError(f"Failed to open directory: {folder}: {error.strerror}") from error
    files = [path for path in paths if os.path.isfile(path)]
    if not files:
        raise RunnerError(f"{folder} holds no files")
    return files


def _in_order(host: HostedProgram, paths: Sequence[str]) -> Dict[str, IoFile]:
    """Files for the inputs in their order: for all, or for all but the retained states."""
    names = [b.name for b in host.inputs]
    sent = [b.name for b in host.inputs if b.name not in host.states]
    for chosen in (names, sent):
        if len(chosen) == len(paths):
            return {name: IoFile(path.strip(), None) for name, path in zip(chosen, paths)}
    raise RunnerError(
        f"Number of input files ({len(paths)}) is not that of the inputs ({len(sent)}): "
        f"{', '.join(sent)}"
    )


def _from_json(host: HostedProgram, path: str) -> List[Tuple[Dict[str, IoFile], Dict[str, IoFile]]]:
    content = parse_json(read_text(path, RunnerError), path, RunnerError)
    rows = content.get("IO-files") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise RunnerError(f"{path}: 'IO-files' must be a list of lists of files")
    folder = os.path.dirname(os.path.abspath(path))
    entries = []
    for number, row in enumerate(rows):
        sides: Dict[str, Dict[str, IoFile]] = {"in": {}, "out": {}}
        for item in row:
            side, name, file = _io_file(host, f"{path}: entry {number}", item, folder)
            if name in sides[side]:
                raise RunnerError(f"{path}: entry {number} has '{name}' twice")
            sides[side][name] = file
        entries.append((sides["in"], sides["out"]))
    return entries


def _io_file(host: HostedProgram, where: str, item: Any, folder: str) -> Tuple[str, str, IoFile]:
    if not isinstance(item, dict):
        raise RunnerError(f"{where}: a file must be an object, not {shown(item)}")
    side, name, path = (item.get(key) for key in ("io-direction", "map-to", "path"))
    if side not in ("in", "out"):
        raise RunnerError(f"{where}: 'io-direction' must be in or out, not {shown(side)}")
    known = {b.name: b for b in (host.inputs if side == "in" else host.outputs)}
    if not isinstance(name, str) or name not in known:
        kind = "input" if side == "in" else "output"
        raise RunnerError(f"{where}: {shown(name)} is no {kind} of the program: {', '.join(known)}")
    if not isinstance(path, str) or not path or "\0" in path:
        raise RunnerError(f"{where}: '{name}' needs the 'path' of a file")
    size = item.get("elem-size", known[name].dtype.itemsize)
    if size != known[name].dtype.itemsize:
        raise RunnerError(
            f"{where}: 'elem-size' of '{name}' is {shown(size)}; the program has elements of "
            f"{known[name].dtype.itemsize} bytes"
        )
    return side, name, IoFile(os.path.join(folder, path), _json_dims(where, name, item))


def _json_dims(where: str, name: str, item: Mapping[str, Any]) -> Optional[Tuple[int, ...]]:
    dims = item.get("dims")
    if dims is None:
        return None
    if not isinstance(dims, list) or not all(
        type(dim) is int and 0 <= dim < _MAX_DIM for dim in dims
    ):
        raise RunnerError(f"{where}: 'dims' of '{name}' must be a list of numbers")
    return tuple(dims)
