"""Checks of specializations, alone and against the graph that they are of: pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from qaic_ray.check.facts import Artifact, ArtifactFinding, ShapesFacts, Target, size_of
from qaic_ray.check.rules import found
from qaic_ray.contract import COMP_CTX_LENGTHS, NUM_LOGITS_TO_KEEP
from qaic_ray.files.documents import shown
from qaic_ray.limits import NAMED_SPECIALIZATIONS_FROM

Findings: TypeAlias = Iterator[ArtifactFinding]

ALSO_CALLED = {
    **dict.fromkeys(("prompt_length", "prompt_len", "input_len"), "seq_len"),
    **dict.fromkeys(("context_length", "context_len"), "ctx_len"),
}
"""What texts about the recipe call two of the keys; compilers know only the other names."""
FULL_BATCH = "full_batch_size"
CTX_STEP = 32

_OF_A_MODEL = ("ctx_len", FULL_BATCH)
_EITHER = (NUM_LOGITS_TO_KEEP, COMP_CTX_LENGTHS, FULL_BATCH)
_CONVERTS = "Convert it: --convert FOLDER."


def forms(artifact: Artifact, target: Target) -> Findings:
    """Whether the compiler's reader takes the file at all."""
    shapes = artifact.shapes
    if shapes is None:
        return
    place = shapes.place
    if shapes.fault:
        remedy = "Write it anew, as `qaic-ray compile` does beside each QPC."
        yield found("specializations-unreadable", place, shapes.fault, remedy)
        return
    if shapes.is_named and target.before(NAMED_SPECIALIZATIONS_FROM):
        yield found(
            "specializations-named",
            place,
            f"Its entries are named (name, symbols), and the compiler of Apps {target.apps_text} "
            "reads flat ones: it exits 255, `type must be string, but is object`.",
            f"{_CONVERTS} Or compile with Apps 1.22 or newer.",
        )
    yield from _values(shapes)
    wrong = [key for entry in shapes.entries for key in entry if key in ALSO_CALLED]
    for key in dict.fromkeys(wrong):
        yield found(
            "specializations-keys",
            place,
            f"The key {key} is no symbol of the graph: the compiler knows {ALSO_CALLED[key]}.",
            _CONVERTS,
        )


def _values(shapes: ShapesFacts) -> Findings:
    for number, entry in enumerate(shapes.entries):
        bad = {key: value for key, value in entry.items() if not _is_size(value)}
        numbers = [key for key, value in entry.items() if type(value) is int]
        if bad:
            key, value = next(iter(bad.items()))
            yield found(
                "specializations-size",
                shapes.place,
                f"{shown(key)} of {_named(shapes, number)} is {shown(value)}.",
                "Give a whole number from 1 on, as a string.",
            )
        elif numbers:
            yield found(
                "specializations-numbers",
                shapes.place,
                f"{', '.join(map(shown, numbers[:3]))} of {_named(shapes, number)} stand there as "
                "numbers: the compiler exits 255, `type must be string, but is number`.",
                _CONVERTS,
            )


def _is_size(value: object) -> bool:
    size = size_of(value)
    return size is not None and size >= 1


def _named(shapes: ShapesFacts, number: int) -> str:
    name = shapes.names[number] if number < len(shapes.names) else ""
    return shown(name) if name else f"entry {number}"


def _renamed(shapes: ShapesFacts) -> list[dict[str, int]]:
    return [
        {ALSO_CALLED.get(key, key): size for key, size in entry.items()} for entry in shapes.sizes
    ]


def together(artifact: Artifact, target: Target) -> Findings:
    """Whether the entries can be of one program."""
    shapes = artifact.shapes
    if shapes is None or shapes.fault:
        return
    entries, place = _renamed(shapes), shapes.place
    for key in _EITHER:
        having = [key in entry for entry in entries]
        if any(having) and not all(having):
            yield found(
                "specializations-differ",
                place,
                f"{key} is in some entries and not in others: it is an input of the graph.",
                f"Give {key} in every entry.",
            )
    for key in _OF_A_MODEL:
        values = sorted({entry[key] for entry in entries if key in entry})
        if len(values) > 1:
            yield found(
                "specializations-context",
                place,
                f"{key} is {' and '.join(map(str, values[:5]))}: the cache of one program has one "
                "shape.",
                f"Give the same {key} in every entry, or compile two programs.",
            )
    if len({tuple(sorted(entry.items())) for entry in entries}) < len(entries):
        yield found(
            "specializations-equal",
            place,
            "Two entries are equal: the second is compiled for nothing.",
            "Leave one of them out.",
        )
    for number, entry in enumerate(entries):
        yield from _of_entry(entry, _named(shapes, number), artifact)
    yield from _compute_contexts(entries, place)


def _of_entry(entry: Mapping[str, int], name: str, artifact: Artifact) -> Findings:
    place = artifact.shapes.place if artifact.shapes is not None else ""
    seq_len, ctx_len = entry.get("seq_len", 1), entry.get("ctx_len", 0)
    reach = entry.get(COMP_CTX_LENGTHS, ctx_len)
    if ctx_len and seq_len > min(ctx_len, reach):
        yield found(
            "prompt-length",
            place,
            f"seq_len {seq_len} of {name} does not fit into its context of {min(ctx_len, reach)}.",
            "Make the context longer, or the prompt's chunks shorter.",
        )
    is_prefill = seq_len > 1 and seq_len != entry.get(NUM_LOGITS_TO_KEEP, 1)
    if is_prefill and seq_len & (seq_len - 1):
        yield found(
            "prompt-length-odd",
            place,
            f"seq_len {seq_len} of {name} is no power of two, as the recipe wants it of a prefill.",
            f"Take {1 << seq_len.bit_length()} or {1 << (seq_len.bit_length() - 1)}.",
        )
    slots, rows = entry.get(FULL_BATCH), entry.get("batch_size", 1)
    if slots is not None and rows > slots:
        yield found(
            "slots",
            place,
            f"batch_size {rows} of {name} is more than its {FULL_BATCH} of {slots}.",
            f"Give at most as many rows as the cache has: raise {FULL_BATCH} or lower batch_size.",
        )
    is_decode = seq_len == 1 or seq_len == entry.get(NUM_LOGITS_TO_KEEP, 1)
    if artifact.is_qefficient and slots is not None and is_decode and rows < slots:
        yield found(
            "slots-unlike",
            place,
            f"{name} decodes {rows} rows of {slots} slots: QEfficient's generate() feeds it "
            f"{slots} rows and stops with `No matching dimension`.",
            "Run it with another program, or compile with equal numbers.",
        )
    if artifact.max_position is not None and ctx_len > artifact.max_position:
        yield found(
            "context-beyond-model",
            place,
            f"ctx_len {ctx_len} of {name} is more than the {artifact.max_position} positions that "
            "the model was made for.",
            f"Take a ctx_len of {artifact.max_position} at most.",
        )


def _compute_contexts(entries: list[dict[str, int]], place: str) -> Findings:
    decodes = {
        entry[COMP_CTX_LENGTHS]
        for entry in entries
        if COMP_CTX_LENGTHS in entry and entry.get("seq_len", 1) == entry.get(NUM_LOGITS_TO_KEEP, 1)
    }
    every = {entry[COMP_CTX_LENGTHS] for entry in entries if COMP_CTX_LENGTHS in entry}
    prefills = {
        entry[COMP_CTX_LENGTHS]
        for entry in entries
        if COMP_CTX_LENGTHS in entry and entry.get("seq_len", 1) != entry.get(NUM_LOGITS_TO_KEEP, 1)
    }
    for value in sorted(prefills & decodes):
        yield found(
            "compute-context",
            place,
            f"{COMP_CTX_LENGTHS} {value} is both of a prefill and of a decode entry.",
            f"Give the prefill one {free_context(value, every)}. {_CONVERTS}",
        )
    beyond = [e for e in entries if e.get(COMP_CTX_LENGTHS, 0) > e.get("ctx_len", 2**31)]
    if beyond:
        length, ctx_len = beyond[0][COMP_CTX_LENGTHS], beyond[0]["ctx_len"]
        yield found(
            "compute-context",
            place,
            f"{COMP_CTX_LENGTHS} {length} does not fit into ctx_len {ctx_len}.",
            f"Take {ctx_len} at most.",
        )
    longest = max((entry.get("ctx_len", 0) for entry in entries), default=0)
    if decodes and max(decodes) < longest:
        yield found(
            "compute-context-short",
            place,
            f"No decode entry has {COMP_CTX_LENGTHS} {longest}: no answer gets beyond "
            f"{max(decodes)}.",
            f"Add a decode entry with {COMP_CTX_LENGTHS} {longest}.",
        )


def free_context(value: int, taken: set[int]) -> int:
    """The highest multiple of 32 below a compute context that is not taken; 1 at least."""
    steps = range((value - 1) // CTX_STEP * CTX_STEP, 0, -CTX_STEP)
    return next((step for step in steps if step not in taken), 1)


def against_graph(artifact: Artifact, target: Target) -> Findings:
    """Whether the graph has the symbols, and no others."""
    shapes, graph = artifact.shapes, artifact.graph
    if shapes is None or shapes.fault or graph is None or not graph.is_readable:
        return
    symbols = {dim: v.name for v in graph.inputs for dim in v.dims if isinstance(dim, str)}
    given = {ALSO_CALLED.get(key, key) for entry in shapes.entries for key in entry}
    flags = artifact.command.flags if artifact.command is not None else {}
    given |= {value.partition(",")[0] for f, value in flags.items() if f == "-onnx-define-symbol"}
    for symbol, name in symbols.items():
        if symbol not in given and name not in graph.weight_inputs:
            yield found(
                "symbols",
                shapes.place,
                f"{shown(symbol or '?')}, a dimension of the input {shown(name)}, has no value.",
                "Give it in every entry, or export the graph with a size in its place.",
            )
    for value in graph.inputs:
        if value.name not in graph.states or len(value.dims) < 3:
            continue
        kept = value.dims[2]
        wanted = max((entry.get("ctx_len", 0) for entry in _renamed(shapes)), default=0)
        if isinstance(kept, int) and wanted and kept != wanted:
            yield found(
                "cache-fixed",
                shapes.place,
                f"The graph's cache {value.name} has {kept} positions, whatever is said here, and "
                f"ctx_len is {wanted}.",
                f"Give ctx_len {kept}, or export with a symbol in its place.",
            )
            return


CHECKS = (forms, together, against_graph)
