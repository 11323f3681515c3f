"""All checks: of one machine, and of the nodes of a cluster against each other. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from qaic_ray.doctor import host_checks, sdk_checks
from qaic_ray.doctor.facts import Finding, MachineFacts, NodeFacts, Verdict, fail, ok, warn

SKEW_S = 2.0
"""Clocks further apart than this put rows and logs of nodes into a wrong order."""
FAR_SKEW_S = 60.0


def of_machine(facts: MachineFacts) -> list[Finding]:
    """What is found of one machine, in the order in which things are mended."""
    checks = (*sdk_checks.CHECKS, *host_checks.CHECKS)
    return [replace(one, node=facts.host) for check in checks for one in check(facts)]


def of_cluster(nodes: Sequence[NodeFacts], here: MachineFacts, folder: str) -> list[Finding]:
    """What is found of each node, and of all of them together.

    Args:
        nodes: what they told.
        here: the machine that asks.
        folder: of the file that each node was to find.
    """
    found: list[Finding] = []
    for node in nodes:
        if node.facts is None:
            remedy = "See `ray status` and the logs of that node's raylet."
            silent = fail("node", node.error or "It did not answer.", remedy)
            found.append(replace(silent, node=node.name))
        else:
            found += [replace(one, node=node.name) for one in of_machine(node.facts)]
    for check in (_versions, _clocks):
        found += check(nodes, here)
    return [*found, *_shared(nodes, folder)]


def _versions(nodes: Sequence[NodeFacts], here: MachineFacts) -> Iterator[Finding]:
    """Ray refuses a node of another version of itself, or of another minor version of Python."""
    told = {node.name: node.facts for node in nodes if node.facts is not None}
    rays = {name: facts.ray.version for name, facts in told.items()}
    pythons = {name: _minor(facts.python) for name, facts in told.items()}
    for what, mine, theirs in (
        ("Ray", here.ray.version, rays),
        ("Python", _minor(here.python), pythons),
    ):
        others = {name: version for name, version in theirs.items() if version != mine}
        for name, version in others.items():
            yield fail(
                f"{what} of all nodes",
                f"{name} has {what} {version}, and this machine {mine}.",
                f"Install the same {what} on all of them.",
            )
        if theirs and not others:
            yield ok(f"{what} of all nodes", mine)
    sdks = {name: f"{f.sdk.kind} {f.sdk.apps}" for name, f in told.items() if not f.sdk.error}
    if len(set(sdks.values())) > 1:
        said = ", ".join(f"{name}: {sdk}" for name, sdk in sdks.items())
        yield warn(
            "SDK of all nodes",
            f"Nodes have different SDKs ({said}).",
            "A QPC is for the SDK that compiled it: install one version everywhere.",
        )


def _clocks(nodes: Sequence[NodeFacts], here: MachineFacts) -> Iterator[Finding]:
    skews = {n.name: (n.skew_s, n.skew_error_s) for n in nodes if n.skew_s is not None}
    found = False
    for name, (skew_s, error_s) in skews.items():
        apart_s = abs(skew_s or 0.0) - error_s
        if apart_s > SKEW_S:
            found = True
            bad = fail if apart_s > FAR_SKEW_S else warn
            ahead = "ahead of" if (skew_s or 0.0) > 0 else "behind"
            yield bad(
                "clocks of all nodes",
                f"{name} is {abs(skew_s or 0.0):.1f} s {ahead} this machine.",
                "Let one server set both: `sudo timedatectl set-ntp true`.",
            )
    if skews and not found:
        most = max(abs(skew_s or 0.0) + error_s for skew_s, error_s in skews.values())
        yield ok("clocks of all nodes", f"less than {max(most, 0.1):.1f} s apart")


def _shared(nodes: Sequence[NodeFacts], folder: str) -> Iterator[Finding]:
    remedy = (
        f"Mount a folder at the same path on all nodes and run from there, or copy model and QPC "
        f"to {folder} of each."
    )
    found = False
    for node in nodes:
        if node.shared in ("absent", "other"):
            found = True
            what = "does not see" if node.shared == "absent" else "sees another folder in place of"
            yield warn("shared folder", f"{node.name} {what} {folder} of this machine.", remedy)
    if not found and any(node.shared == "seen" for node in nodes):
        yield ok("shared folder", f"{folder} is the same on all nodes")


def _minor(python: str) -> str:
    return ".".join(python.split(".")[:2])


def worst(findings: Iterable[Finding]) -> Verdict:
    """The worst verdict of all; OK where there is none."""
    verdicts = {finding.verdict for finding in findings}
    return next((v for v in (Verdict.FAIL, Verdict.WARN) if v in verdicts), Verdict.OK)
