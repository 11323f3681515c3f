"""All checks of artifacts, in the order in which things are mended."""

from __future__ import annotations

from collections.abc import Iterable

from qaic_ray.check import config_checks, graph_checks, shape_checks, weight_checks
from qaic_ray.check.facts import Artifact, ArtifactFinding, Grade, Target

CHECKS = (
    *shape_checks.CHECKS,
    *config_checks.CHECKS,
    *graph_checks.CHECKS,
    *weight_checks.CHECKS,
)


def findings(artifacts: Iterable[Artifact], target: Target) -> list[ArtifactFinding]:
    """What is found of artifacts, each finding once; none where all is well."""
    found = (one for artifact in artifacts for check in CHECKS for one in check(artifact, target))
    return list(dict.fromkeys(found))


def refused(found: Iterable[ArtifactFinding]) -> list[ArtifactFinding]:
    """Those that stop a compiler, a card or a program."""
    return [one for one in found if one.grade is Grade.REFUSED]
