"""What a path is, and the facts of everything that belongs together there.

Known: an ONNX file, a specializations.json, a custom IO list, an MDP file, a QPC, a
qaic-compile.sh, an export folder, a compiled variant, and any level of QEfficient's cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

from qaic_ray.check.facts import Artifact, CommandFacts, GraphFacts, ShapesFacts
from qaic_ray.check.reading.documents import (
    read_custom_io,
    read_hashed_params,
    read_partitions,
    read_script,
    read_shapes,
)
from qaic_ray.check.reading.graphs import read_graph
from qaic_ray.check.reading.programs import read_program
from qaic_ray.compile.compiler import QPC_FILE, QPC_MAGIC
from qaic_ray.compile.store import SPECIALIZATIONS_FILE, VARIANT_FILE, check_kept, program_facts
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import parse_json, read_text
from qaic_ray.files.folders import first_fault
from qaic_ray.model.checkpoint import CUSTOM_IO_FILE, MANIFEST_FILE, read_manifest

HASHED_PARAMS = "hashed_compile_params.json"
SCRIPT = "qaic-compile.sh"
QPC_FOLDER = "qpc"
MAX_ARTIFACTS = 200
MAX_DEPTH = 5
"""Of folders below the one that was given."""

_KINDS = (
    "an .onnx file, a specializations.json, a custom IO list (.yaml), an MDP file (.json), a "
    "programqpc.bin, a qaic-compile.sh, or a folder of export, compile or QEfficient"
)
_GRAPHS = ("*.onnx", "generatedModels/*.onnx")


def read_artifacts(path: Path) -> list[Artifact]:
    """The facts of what is at a path: one artifact of a file, one or more of a folder.

    Raises:
        UsageError: nothing is there, or nothing that is known.
    """
    if not path.exists():
        raise UsageError(f"{path} is not there: give {_KINDS}.")
    found = list(islice(_of_tree(path), MAX_ARTIFACTS)) if path.is_dir() else [_of_file(path)]
    if not found:
        raise UsageError(f"{path} holds nothing that can be checked: give {_KINDS}.")
    return found


def _of_file(path: Path) -> Artifact:
    if not path.is_file():
        raise UsageError(f"{path} is no file: give {_KINDS}.")
    place, suffix = path.name, path.suffix.lower()
    if suffix == ".onnx":
        return Artifact(path, graph=read_graph(path, place))
    if path.name == QPC_FILE or _begins(path, QPC_MAGIC):
        return _of_program(path.parent, path.parent)
    if suffix in (".yaml", ".yml") and ("custom_io" in path.name or _has(path, "IOName")):
        return Artifact(path, custom_io=read_custom_io(path, place))
    if suffix == ".sh":
        return Artifact(path, command=read_script(path, place))
    if suffix == ".json":
        return _of_json(path, place)
    raise UsageError(f"{path} is nothing that can be checked: give {_KINDS}.")


def _of_json(path: Path, place: str) -> Artifact:
    """By what it holds; by its name where that cannot be read."""
    try:
        document = parse_json(read_text(path), str(path))
    except UsageError:
        document = None
    keys = document.keys() if isinstance(document, dict) else set()
    if "partitions" in keys or path.name.startswith("mdp"):
        return Artifact(path, partitions=read_partitions(path, place))
    if "command" in keys:
        command, shapes = read_hashed_params(path, place)
        return Artifact(path, command=command, shapes=shapes, is_qefficient=True)
    if "specializations" in keys or path.name.startswith("specializations"):
        return Artifact(path, shapes=read_shapes(path, place))
    raise UsageError(f"{path} is nothing that can be checked: give {_KINDS}.")


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def _has(path: Path, word: str) -> bool:
    try:
        return word in read_text(path)
    except UsageError:
        return False


def _of_tree(root: Path) -> Iterator[Artifact]:
    pending = [(root, 0)]
    while pending:
        folder, depth = pending.pop()
        found = list(_of_folder(folder, root))
        yield from found
        if not found and depth < MAX_DEPTH:
            pending += [(inner, depth + 1) for inner in reversed(_folders(folder))]


def _folders(folder: Path) -> list[Path]:
    """Folders inside, links left out: QEfficient puts one to the checkpoint beside its model."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(f"{folder} cannot be looked through: {error.strerror}.") from error
    return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _of_folder(folder: Path, root: Path) -> Iterator[Artifact]:
    if (folder / MANIFEST_FILE).is_file():
        yield _of_export(folder, root)
    elif (folder / QPC_FILE).is_file() or (folder / VARIANT_FILE).is_file():
        yield _of_program(folder, root)
    elif _is_compile(folder):
        yield _of_compile(folder, root, None)
    else:
        graphs = sorted(path for pattern in _GRAPHS for path in folder.glob(pattern))
        compiles = [inner for inner in _folders(folder) if graphs and _is_compile(inner)]
        for compiled in compiles:
            yield _of_compile(compiled, root, graphs[0])
        for graph in graphs if not compiles else ():
            yield _of_graph(graph, folder, root)


def _place(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix() if path != root else path.name
    return name or str(path)


def _of_graph(graph: Path, folder: Path, root: Path) -> Artifact:
    """A graph without a record: its files by the names that the recipe's scripts give them."""
    custom_io, shapes = folder / CUSTOM_IO_FILE, folder / SPECIALIZATIONS_FILE
    said = read_shapes(shapes, _place(shapes, root)) if shapes.is_file() else None
    return Artifact(
        folder,
        graph=read_graph(graph, _place(graph, root), _wanted(said)),
        shapes=said,
        custom_io=read_custom_io(custom_io, _place(custom_io, root))
        if custom_io.is_file()
        else None,
    )


def _of_export(folder: Path, root: Path) -> Artifact:
    place = _place(folder / MANIFEST_FILE, root)
    try:
        manifest = read_manifest(folder)
    except UsageError as error:
        return Artifact(folder, faults=(("export-changed", place, str(error)),))
    onnx, custom_io = folder / manifest.onnx_file, folder / CUSTOM_IO_FILE
    shapes = folder / SPECIALIZATIONS_FILE
    said = read_shapes(shapes, _place(shapes, root)) if shapes.is_file() else None
    fault = first_fault(folder, manifest.files)
    if not fault and not onnx.is_file():
        fault = f"{manifest.onnx_file} is not there"
    return Artifact(
        folder,
        graph=read_graph(onnx, _place(onnx, root), _wanted(said)) if onnx.is_file() else None,
        shapes=said,
        custom_io=read_custom_io(custom_io, _place(custom_io, root))
        if custom_io.is_file()
        else None,
        max_position=manifest.max_position,
        faults=(("export-changed", place, f"{fault}."),) if fault else (),
    )


def _of_program(folder: Path, root: Path) -> Artifact:
    """A QPC, with what its folder says of it."""
    binary, shapes = folder / QPC_FILE, folder / SPECIALIZATIONS_FILE
    program = read_program(folder, _place(binary, root))
    faults = []
    if not program.fault:
        try:
            check_kept(folder)
        except UsageError as error:
            faults.append(("program-changed", _place(binary, root), str(error)))
    said = read_shapes(shapes, _place(shapes, root)) if shapes.is_file() else None
    return Artifact(
        folder,
        shapes=said,
        program=program,
        command=_recorded(folder, root),
        faults=tuple(faults),
    )


def _recorded(folder: Path, root: Path) -> CommandFacts | None:
    """The flags that `variant.json` says a variant was compiled with."""
    path = folder / VARIANT_FILE
    entries = program_facts(folder)
    if not path.is_file() or not isinstance(entries.get("num_cores"), int):
        return None
    flags = {"-aic-num-cores": str(entries["num_cores"]), "-retained-state": ""}
    precision = entries.get("precision")
    flags |= {"-convert-to-fp16": ""} if precision != "fp32" else {}
    flags |= {"-mxfp6-matmul": ""} if precision == "mx6" else {}
    return CommandFacts(_place(path, root), "", "", flags)


def _is_compile(folder: Path) -> bool:
    """Whether it is the folder of one compile, as QEfficient makes them."""
    names = (HASHED_PARAMS, SCRIPT, f"{QPC_FOLDER}/{QPC_FILE}")
    if any((folder / name).is_file() for name in names):
        return True
    is_begun = (folder / QPC_FOLDER).is_dir() or folder.name.startswith(f"{QPC_FOLDER}-")
    return is_begun and (folder / SPECIALIZATIONS_FILE).is_file()


def _of_compile(folder: Path, root: Path, graph: Path | None) -> Artifact:
    faults: list[tuple[str, str, str]] = []
    command, shapes = _how(folder, root)
    written = folder / SPECIALIZATIONS_FILE
    if written.is_file():
        shapes = read_shapes(written, _place(written, root))
    qpc = folder / QPC_FOLDER
    program = read_program(qpc, _place(qpc / QPC_FILE, root)) if (qpc / QPC_FILE).exists() else None
    if program is None and not (folder / SCRIPT).is_file():
        why = f"There is no {QPC_FOLDER}/{QPC_FILE}: its compile failed, or was stopped."
        faults.append(("program-missing", _place(folder, root), why))
    if program is not None and not written.is_file():
        why = f"There is no {SPECIALIZATIONS_FILE} beside {QPC_FOLDER}."
        faults.append(("specializations-missing", _place(folder, root), why))
    custom_io, partitions = folder / CUSTOM_IO_FILE, sorted(folder.glob("mdp*.json"))
    path = graph or _named_graph(command)
    return Artifact(
        folder,
        graph=read_graph(path, _graph_place(path, root), _wanted(shapes)) if path else None,
        shapes=shapes,
        custom_io=read_custom_io(custom_io, _place(custom_io, root))
        if custom_io.is_file()
        else None,
        partitions=read_partitions(partitions[0], _place(partitions[0], root))
        if partitions
        else None,
        command=command,
        program=program,
        is_qefficient=True,
        faults=tuple(faults),
    )


def _how(folder: Path, root: Path) -> tuple[CommandFacts | None, ShapesFacts | None]:
    """How it was compiled, by its record; else how it is to be, by its script."""
    record, script = folder / HASHED_PARAMS, folder / SCRIPT
    if record.is_file():
        return read_hashed_params(record, _place(record, root))
    if script.is_file():
        return read_script(script, _place(script, root)), None
    return None, None


def _named_graph(command: CommandFacts | None) -> Path | None:
    name = command.flags.get("-m", "") if command is not None else ""
    if not name or "\0" in name or not Path(name).is_absolute():
        return None
    path = Path(name)
    try:
        return path if path.is_file() else None
    except OSError:
        return None


def _graph_place(path: Path, root: Path) -> str:
    return _place(path, root) if path.is_relative_to(root) else str(path)


def _wanted(shapes: ShapesFacts | None) -> Sequence[Mapping[str, int]]:
    """The specializations that shapes are looked at of: the longest and the shortest."""
    sizes = shapes.sizes if shapes is not None else ()
    if not sizes:
        return ()
    ordered = sorted(sizes, key=lambda entry: (entry.get("seq_len", 0), entry.get("batch_size", 0)))
    return [ordered[-1]] if len(ordered) == 1 else [ordered[-1], ordered[0]]


def of_compile(
    graph: Path,
    custom_io: Path | None,
    *,
    symbols: Sequence[Mapping[str, str]],
    command: CommandFacts,
) -> Artifact:
    """What a compile is about to be given, without shapes of values inside of the graph."""
    status = graph.stat()
    is_listed = custom_io is not None and "-custom-IO-list-file" in command.flags
    return Artifact(
        graph,
        graph=_headers(graph, status.st_mtime_ns, status.st_size),
        shapes=ShapesFacts("specializations", entries=tuple(symbols)),
        custom_io=read_custom_io(custom_io, custom_io.name) if custom_io and is_listed else None,
        command=command,
    )


@lru_cache(maxsize=8)
def _headers(graph: Path, _modified_ns: int, _size: int) -> GraphFacts:
    """A graph's facts without shapes, read once for all variants of it."""
    return read_graph(graph, graph.name, None)
