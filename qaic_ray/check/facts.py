"""What is known of an artifact: plain facts of its files; and what a check finds in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeAlias

from qaic_ray.limits import CardLimits, Version

Dims: TypeAlias = tuple[int | None, ...]
"""A shape; None where a dimension has no value."""


class Grade(str, Enum):
    """What becomes of it."""

    REFUSED = "refused"
    """The compiler, the card or the programs that run it stop."""
    REMARK = "remark"
    """It compiles and runs, slower, shorter or less exact than it could."""


@dataclass(frozen=True)
class Rule:
    """What is looked for: its grade, and where the rule stands."""

    grade: Grade
    source: str


@dataclass(frozen=True)
class ArtifactFinding:
    """One thing that was found.

    Attributes:
        rule: its name in `rules.RULES`.
        place: the file, as it was given or below the folder that was.
        says: what is wrong, with the names and numbers of this artifact.
        remedy: what to do.
        source: where the rule stands.
    """

    rule: str
    grade: Grade
    place: str
    says: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Target:
    """What an artifact is for.

    Attributes:
        apps: the SDK's Apps version; empty where nobody says, and then no rule of a version counts.
        card: one SoC; None where nobody says.
    """

    apps: Version = ()
    card: CardLimits | None = None

    def before(self, version: Version) -> bool:
        """Whether the SDK is known, and older."""
        return bool(self.apps) and self.apps < version

    @property
    def apps_text(self) -> str:
        """The version in words."""
        return ".".join(map(str, self.apps[:2]))


@dataclass(frozen=True)
class ShapesFacts:
    """A specializations.json: its entries as they were written, names apart."""

    place: str
    fault: str = ""
    is_named: bool = False
    entries: tuple[Mapping[str, object], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[Mapping[str, int], ...]:
        """Symbol -> size of each entry, of the values that are sizes in any spelling."""
        return tuple(
            {key: size for key, value in entry.items() if (size := size_of(value) or 0) >= 1}
            for entry in self.entries
        )


def size_of(value: object) -> int | None:
    """A size that was written as a number or as digits; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if abs(value) < 2**31 else None
    if isinstance(value, str) and len(value) <= 10 and value.isascii() and value.isdigit():
        return int(value)
    return None


@dataclass(frozen=True)
class CustomIoFacts:
    """A custom IO list: name -> precision, in the order of the lines."""

    place: str
    fault: str = ""
    precisions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PartitionFacts:
    """An MDP file: for each partition its devices as (id, cores), and who talks to whom."""

    place: str
    fault: str = ""
    partitions: tuple[tuple[tuple[int, int], ...], ...] = ()
    connections: tuple[tuple[int, ...], ...] = ()

    @property
    def devices(self) -> tuple[tuple[int, int], ...]:
        """Of all partitions."""
        return tuple(device for partition in self.partitions for device in partition)


@dataclass(frozen=True)
class CommandFacts:
    """How something is, or was, compiled: flag -> value, empty for a switch.

    `compiler` is the name of the program, empty where nobody says.
    """

    place: str
    fault: str = ""
    compiler: str = ""
    flags: Mapping[str, str] = field(default_factory=dict)

    def has(self, flag: str) -> bool:
        """Whether a switch is on."""
        return flag in self.flags and self.flags[flag].lower() not in ("false", "0")


@dataclass(frozen=True)
class ProgramFacts:
    """A programqpc.bin, by its table and its descriptor."""

    place: str
    fault: str = ""
    num_cores: int = 0
    num_devices: int = 1
    bytes_on_card: int = 0
    """Of constants and code, on each device."""


@dataclass(frozen=True)
class ValueFacts:
    """An input or output of a graph; `dims` has texts for symbols, empty ones for unknown sizes."""

    name: str
    type: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class TensorFacts:
    """An initializer, or a large constant: its type, shape and size, and where its bytes are.

    `largest` is its largest finite magnitude, where it is small, inline and floating point.
    """

    name: str
    type: str
    dims: tuple[int, ...]
    num_bytes: int
    location: str = ""
    offset: int = 0
    largest: float = 0.0

    @property
    def num_elements(self) -> int:
        """How many there are."""
        count = 1
        for dim in self.dims:
            count *= dim
        return count

    @property
    def is_float(self) -> bool:
        """Whether precision flags change how it is kept."""
        return self.type in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


@dataclass(frozen=True)
class OperatorFacts:
    """An operator; `label` is its name or first output."""

    op: str
    domain: str
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class GraphFacts:
    """An ONNX model without its weights.

    Attributes:
        inputs: those that a caller gives.
        fixed: names of values that depend on weights and shapes alone.
        shapes: of values, under one specialization each; without any, one with what is known.
        functions: (domain, name) that the file itself defines.
        weight_inputs: graph inputs that are weights of a checkpoint, by its metadata.
        faults: what keeps it from being read, and of its weights' files, with the rule of each.
    """

    place: str
    faults: tuple[tuple[str, str], ...] = ()
    file_bytes: int = 0
    inputs: tuple[ValueFacts, ...] = ()
    outputs: tuple[ValueFacts, ...] = ()
    tensors: Mapping[str, TensorFacts] = field(default_factory=dict)
    nodes: tuple[OperatorFacts, ...] = ()
    fixed: frozenset[str] = frozenset()
    shapes: tuple[Mapping[str, Dims], ...] = ()
    functions: frozenset[tuple[str, str]] = frozenset()
    weight_inputs: frozenset[str] = frozenset()

    @property
    def states(self) -> dict[str, str]:
        """Input -> output of what stays on the card."""
        outputs = {value.name for value in self.outputs}
        names = [value.name for value in self.inputs]
        return {n: n + "_RetainedState" for n in names if n + "_RetainedState" in outputs}

    @property
    def is_readable(self) -> bool:
        """Whether there is a graph."""
        return bool(self.nodes)


@dataclass(frozen=True)
class Artifact:
    """Everything of one program, or of one file, that was found together.

    Attributes:
        place: the folder or file.
        max_position: the longest context that the model is right for; None where nobody says.
        faults: of the folder itself, with the rule of each.
    """

    place: Path
    graph: GraphFacts | None = None
    shapes: ShapesFacts | None = None
    custom_io: CustomIoFacts | None = None
    partitions: PartitionFacts | None = None
    command: CommandFacts | None = None
    program: ProgramFacts | None = None
    max_position: int | None = None
    is_qefficient: bool = False
    faults: tuple[tuple[str, str, str], ...] = ()
    """Each: the rule, the place, and what is wrong."""
