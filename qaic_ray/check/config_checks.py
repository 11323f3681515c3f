"""Checks of custom IO lists, MDP files, command lines, programs and folders: pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from qaic_ray.check.facts import Artifact, ArtifactFinding, CommandFacts, Target, ValueFacts
from qaic_ray.check.rules import found
from qaic_ray.files.documents import shown
from qaic_ray.limits import AI100_HW_VERSION_FROM, MAX_CORES

Findings: TypeAlias = Iterator[ArtifactFinding]

RETAINED = "_RetainedState"
PRECISIONS = ("float", "float16", "mxint8")
MX_BLOCK = 32
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
_CONVERTS = "Convert it: --convert FOLDER."


def custom_io(artifact: Artifact, target: Target) -> Findings:
    """Names and precisions of a custom IO list, alone and against the graph."""
    facts = artifact.custom_io
    if facts is None:
        return
    place = facts.place
    if facts.fault:
        remedy = "Write pairs of lines: ` - IOName: past_key.0`, then `   Precision: float16`."
        yield found("custom-io-unreadable", place, facts.fault, remedy)
        return
    unknown = {n: p for n, p in facts.precisions.items() if p.lower() not in PRECISIONS}
    for name, precision in list(unknown.items())[:3]:
        yield found(
            "custom-io-precision",
            place,
            f"{shown(name)} has the precision {shown(precision)}.",
            f"Give one of {', '.join(PRECISIONS)}.",
        )
    halves = [name for name in facts.precisions if _other(name) in _states(artifact)]
    unlike = [n for n in halves if facts.precisions.get(_other(n)) != facts.precisions[n]]
    if unlike:
        name, other = unlike[0], facts.precisions.get(_other(unlike[0]))
        has = f"has {shown(other)}" if other else "is not listed"
        yield found(
            "custom-io-half",
            place,
            f"{shown(name)} has {shown(facts.precisions[name])}, and {_other(name)} {has}: the "
            "state that is kept cannot be read again.",
            f"Give both the same precision. {'' if other else _CONVERTS}".strip(),
        )
    yield from _custom_io_of_graph(artifact)


def _other(name: str) -> str:
    """The other half of a state."""
    return name[: -len(RETAINED)] if name.endswith(RETAINED) else name + RETAINED


def _states(artifact: Artifact) -> set[str]:
    """Names of states, both halves: those of the graph, else what looks like a cache."""
    if artifact.graph is not None and artifact.graph.is_readable:
        pairs = artifact.graph.states
        return {*pairs, *pairs.values()}
    facts = artifact.custom_io
    names = facts.precisions if facts is not None else {}
    return {n for name in names if name.startswith("past_") for n in (name, _other(name))}


def _custom_io_of_graph(artifact: Artifact) -> Findings:
    facts, graph = artifact.custom_io, artifact.graph
    if facts is None or graph is None or not graph.is_readable:
        return
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    strange = [name for name in facts.precisions if name not in values]
    if strange:
        yield found(
            "custom-io-name",
            facts.place,
            f"{shown(strange[0])} is no input or output of the graph"
            + (f", and {len(strange) - 1} more are none" if len(strange) > 1 else "")
            + ": its line has no effect.",
            "Write the names as the graph has them.",
        )
    for name, precision in facts.precisions.items():
        value = values.get(name)
        if value is not None and value.type not in _FLOATS:
            yield found(
                "custom-io-integer",
                facts.place,
                f"{shown(name)} is {value.type} and has the precision {shown(precision)}.",
                "Leave it out: only floating point has one.",
            )
    wide = [n for n, p in facts.precisions.items() if p.lower() == "mxint8" and n in values]
    narrow = [values[n] for n in wide if _is_uneven(values[n])]
    if narrow:
        yield found(
            "mxint8-width",
            facts.place,
            f"{narrow[0].name} cannot be mxint8: its last dimension is {narrow[0].dims[-1]}, no "
            f"multiple of {MX_BLOCK}.",
            "Keep it in float16.",
        )


def _is_uneven(value: ValueFacts) -> bool:
    last = value.dims[-1] if value.dims else 0
    return isinstance(last, int) and last % MX_BLOCK != 0


def wide_cache(artifact: Artifact, target: Target) -> Findings:
    """A cache that travels and lies in float32 where everything else is fp16."""
    graph, command, facts = artifact.graph, artifact.command, artifact.custom_io
    if graph is None or command is None or not command.has("-convert-to-fp16"):
        return
    if facts is not None and facts.fault:
        return
    listed = facts.precisions if facts is not None else {}
    wide = [
        value.name
        for value in graph.inputs
        if value.name in graph.states
        and value.type == "FLOAT"
        and listed.get(value.name, "float") == "float"
    ]
    if wide:
        yield found(
            "custom-io-wide",
            facts.place if facts is not None else graph.place,
            f"{wide[0]} and {len(wide) - 1} more states are float32 for programs, though "
            "-convert-to-fp16 is said.",
            "List them, and their _RetainedState, with Precision float16.",
        )


def partitions(artifact: Artifact, target: Target) -> Findings:
    """Devices, cores and connections of an MDP file."""
    facts = artifact.partitions
    if facts is None:
        return
    place = facts.place
    if facts.fault:
        yield found("mdp-unreadable", place, facts.fault, "See the vendor's model sharding page.")
        return
    ids = sorted({device for device, _ in facts.devices})
    if ids != list(range(len(ids))):
        yield found(
            "mdp-ids",
            place,
            f"Its deviceIds are {', '.join(map(str, ids[:8]))}: they count from 0, and the cards "
            "are named when the program is run.",
            _CONVERTS,
        )
    cores = {count for _, count in facts.devices}
    most = target.card.nsps if target.card is not None else MAX_CORES
    if max(cores) > most:
        kind = f"a {target.card.name} SoC" if target.card is not None else "the largest SoC"
        yield found(
            "mdp-cores",
            place,
            f"A device has {max(cores)} cores, and {kind} {most}: `Failed to allocate NSP "
            "resources`.",
            f"Take {most} at most. {_CONVERTS}",
        )
    if len(cores) > 1:
        yield found(
            "mdp-uneven",
            place,
            f"Devices have {' and '.join(map(str, sorted(cores)))} cores: the others wait for the "
            "one with the fewest.",
            "Give all the same number.",
        )
    strange = {peer for group in facts.connections for peer in group} - set(ids)
    if strange:
        yield found(
            "mdp-connection",
            place,
            f"A connection names device {min(strange)}, which no partition has.",
            "Connect the devices of the partitions.",
        )
    elif len(ids) > 1 and not {peer for group in facts.connections for peer in group} >= set(ids):
        yield found(
            "mdp-through-host",
            place,
            "Not all devices are in its connections: what they tell each other goes through the "
            "host.",
            f"Connect them with type p2p. {_CONVERTS}",
        )
    yield from _heads(artifact, len(ids))


def _heads(artifact: Artifact, num_devices: int) -> Findings:
    facts, graph = artifact.partitions, artifact.graph
    if facts is None or graph is None or len(facts.partitions) != 1:
        return
    heads = [v.dims[1] for v in graph.inputs if v.name in graph.states and len(v.dims) == 4]
    counts = [count for count in heads if isinstance(count, int)]
    if counts and min(counts) < num_devices:
        yield found(
            "mdp-heads",
            facts.place,
            f"The cache has {min(counts)} heads for {num_devices} devices: slices of a layer are "
            "not even.",
            "Export with the heads of keys and values replicated (num_replicate_kv_heads), or "
            "slice over fewer devices.",
        )


def command(artifact: Artifact, target: Target) -> Findings:
    """Flags that are wrong together, or for this SDK and card."""
    facts = artifact.command
    if facts is None:
        return
    place = facts.place
    if facts.fault:
        yield found("command-unreadable", place, facts.fault, "Write the compiler's command anew.")
        return
    yield from cores_fit(_number(facts.flags.get("-aic-num-cores", "")), place, target)
    hardware = facts.flags.get("-aic-hw-version")
    if hardware in ("ai100", "ai200") and target.before(AI100_HW_VERSION_FROM):
        yield found(
            "hw-version",
            place,
            f"-aic-hw-version={hardware}, and the compiler of Apps {target.apps_text} knows 2.0.",
            "Say -aic-hw-version=2.0.",
        )
    slices = "-sdp-cluster-sizes" in facts.flags
    if slices and (
        facts.has("-aic-enable-depth-first") or "-mdp-load-partition-config" in facts.flags
    ):
        yield found(
            "partitions-together",
            place,
            "-sdp-cluster-sizes stands beside -aic-enable-depth-first or an MDP file.",
            "Leave -sdp-cluster-sizes out.",
        )
    if facts.compiler:
        yield from _usual(facts, artifact)


def _usual(facts: CommandFacts, artifact: Artifact) -> Findings:
    """Flags that whole command lines have."""
    is_quantized = any("quantiz" in f or f.endswith("-profile") for f in facts.flags)
    if not facts.has("-convert-to-fp16") and not is_quantized:
        yield found(
            "no-fp16",
            facts.place,
            "-convert-to-fp16 is missing: everything is computed in float32.",
            "Add -convert-to-fp16.",
        )
    if facts.compiler == "qaic-exec" and not facts.has("-compile-only"):
        yield found(
            "no-compile-only",
            facts.place,
            "-compile-only is missing: qaic-exec runs the program on a card after it compiled it.",
            "Add -compile-only.",
        )
    graph = artifact.graph
    if graph is not None and graph.states and not facts.has("-retained-state"):
        yield found(
            "no-retained-state",
            facts.place,
            f"-retained-state is missing: the {len(graph.states)} states of the graph travel "
            "through the host in each step.",
            "Add -retained-state.",
        )
    named = facts.flags.get("-m", "")
    if artifact.is_qefficient and graph is None and named.startswith("/"):
        yield found(
            "model-moved",
            facts.place,
            f"It was compiled from {shown(named)}, which is not there: the next compile() makes "
            "it again.",
            "Keep the cache where it was made, or compile anew.",
        )


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def cores_fit(cores: int, place: str, target: Target) -> Findings:
    """A program's NSPs against those of the SoC."""
    most = target.card.nsps if target.card is not None else MAX_CORES
    if cores > most:
        kind = f"a {target.card.name} SoC has" if target.card is not None else "the largest SoC has"
        yield found(
            "cores",
            place,
            f"It needs {cores} cores, and {kind} {most}: `Failed to allocate NSP resources`.",
            f"Compile for {most} cores at most.",
        )


def program(artifact: Artifact, target: Target) -> Findings:
    """A QPC: whole, and small enough for the card."""
    facts = artifact.program
    if facts is None:
        return
    if facts.fault:
        rule = "program-parts" if "has no" in facts.fault else "program-unreadable"
        yield found(rule, facts.place, facts.fault, "Compile it again.")
        return
    if artifact.command is None or artifact.command.fault:
        yield from cores_fit(facts.num_cores, facts.place, target)
    if target.card is not None and facts.bytes_on_card > target.card.dram_bytes:
        yield found(
            "dram",
            facts.place,
            f"Its constants and code have {facts.bytes_on_card / 2**30:.1f} GiB, and a "
            f"{target.card.name} SoC {target.card.dram_bytes / 2**30:.1f} GiB: `Memory resource "
            "exhausted`.",
            "Compile with -mxfp6-matmul, or for several SoCs.",
        )


_FOLDER_REMEDIES = {
    "export-changed": "Export the model again.",
    "program-changed": "Compile it again.",
    "program-missing": "Compile it again; what is left of it may be removed.",
    "specializations-missing": "Copy the file that it was compiled with there.",
}


def folder(artifact: Artifact, target: Target) -> Findings:
    """What is missing in a folder, or is not what was written."""
    for rule, place, says in artifact.faults:
        yield found(rule, place, says, _FOLDER_REMEDIES[rule])


CHECKS = (folder, custom_io, wide_cache, partitions, command, program)
