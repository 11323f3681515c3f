"""Gathers facts of this machine, or of every node of a cluster, and has them checked."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.doctor.checks import of_cluster, of_machine, worst
from qaic_ray.doctor.facts import Finding, MachineFacts, NodeFacts, Verdict
from qaic_ray.doctor.probes import machine_facts
from qaic_ray.errors import UsageError
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import name_for_others

if TYPE_CHECKING:
    from qaic_ray.cards.inventory import Node
    from qaic_ray.cluster.cluster import Cluster

CLOCK_LOOKS = 4
"""Clocks are asked so often: the quickest answer bounds the skew best, and the first is slow."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and the facts that it was found from."""

    findings: Sequence[Finding]
    facts: Sequence[MachineFacts]

    @property
    def is_well(self) -> bool:
        """Whether nothing must be mended."""
        return worst(self.findings) is not Verdict.FAIL

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "ok": self.is_well,
            "checks": [{**asdict(one), "verdict": one.verdict.value} for one in self.findings],
            "facts": [_plain(asdict(facts)) for facts in self.facts],
        }


def doctor_step(
    sdk: str, address: str | None, folder: Path, *, tries_cards: bool = False
) -> Diagnosis:
    """Look at this machine, or at every node of a cluster.

    Args:
        sdk: as `--sdk` names it.
        address: of a Ray cluster; None for this machine alone.
        folder: where runs would be, on this machine.
        tries_cards: run a tiny program on every card that is free.

    Raises:
        UsageError: no such cluster, or one that this machine cannot join.
    """
    if address is None:
        here = machine_facts(sdk, EmulatorOptions(), folder, tries_cards=tries_cards)
        return Diagnosis(of_machine(here), [here])
    from qaic_ray.cluster.cluster import Cluster

    here = machine_facts(sdk, EmulatorOptions(), folder)
    with Cluster(0, address=address) as cluster:
        nodes = node_facts(cluster, name_for_others(sdk), folder, tries_cards=tries_cards)
    findings = of_cluster(nodes, here, str(folder.absolute()))
    return Diagnosis(findings, [node.facts for node in nodes if node.facts is not None])


def node_facts(
    cluster: Cluster, sdk: str, folder: Path, *, tries_cards: bool = False
) -> list[NodeFacts]:
    """What every node of a cluster tells."""
    skews: dict[str, tuple[float, float]] = {}
    with _shared_file(folder) as (path, content):
        asked = _Question(sdk, str(folder.absolute()), path, content, tries_cards)
        told = cluster.each_node("doctor", _look, (asked,))
        for _ in range(CLOCK_LOOKS):
            began_s = time.time()
            clocks = cluster.each_node("clock", _clock, ())
            ended_s = time.time()
            error_s = (ended_s - began_s) / 2
            for node, clock_s in clocks:
                old = skews.get(node.node_id)
                if not isinstance(clock_s, str) and (old is None or error_s < old[1]):
                    skews[node.node_id] = clock_s - (began_s + ended_s) / 2, error_s
    found = []
    for node, answer in told:
        if isinstance(answer, str):
            found.append(NodeFacts(node.address, error=answer))
            continue
        facts, shared = answer
        skew_s, error_s = skews.get(node.node_id, (None, 0.0))
        name = f"{facts.host} ({node.address})"
        found.append(NodeFacts(name, facts, skew_s=skew_s, skew_error_s=error_s, shared=shared))
    return found


@dataclass(frozen=True)
class _Question:
    """What a node is asked: its facts, with this SDK and folder, and what `path` holds there."""

    sdk: str
    folder: str
    path: str
    content: str
    tries_cards: bool


def _look(node: Node, asked: _Question) -> tuple[MachineFacts, str]:
    """The facts of a node, and what it sees in the place of a file of the machine that asks."""
    here = Path(asked.folder)
    folder = here if here.is_dir() else Path.cwd()
    facts = machine_facts(asked.sdk, EmulatorOptions(), folder, tries_cards=asked.tries_cards)
    try:
        seen = Path(asked.path).read_text(encoding="ascii") == asked.content
    except (OSError, ValueError):
        return facts, "other" if here.is_dir() else "absent"
    return facts, "seen" if seen else "other"


def _clock(node: Node) -> float:
    return time.time()


@contextmanager
def _shared_file(folder: Path) -> Iterator[tuple[str, str]]:
    """A file of a few digits for the nodes to find, while they look for it."""
    content = secrets.token_hex(8)
    path = folder.absolute() / f".qaic-ray-doctor-{content}"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError as error:
        raise UsageError(
            f"{folder.absolute()} cannot be written ({error.strerror}): run doctor in the folder "
            "that the nodes are to share."
        ) from error
    try:
        with open(descriptor, "w", encoding="ascii") as stream:
            stream.write(content)
        yield str(path), content
    finally:
        path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Values of facts as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    return sorted(value) if isinstance(value, frozenset) else value
