"""Artifacts looked at before a compiler or a card sees them, and converted where that can be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qaic_ray.check.artifacts import read_artifacts
from qaic_ray.check.builds import cards_of
from qaic_ray.check.checks import findings, refused
from qaic_ray.check.conversions import Conversion, conversions
from qaic_ray.check.facts import ArtifactFinding, Target
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import shown, user_path
from qaic_ray.files.folders import building, locked
from qaic_ray.limits import CARDS, CardLimits, card_limits, version_of
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import find_sdk


@dataclass(frozen=True)
class CheckAsked:
    """What is checked, and for what: empty texts mean the SDK and the cards of this machine.

    `convert` is the folder that converted files are written to; None for none.
    """

    path: Path
    sdk: str = "auto"
    sdk_version: str = ""
    sku: str = ""
    convert: Path | None = None


@dataclass(frozen=True)
class Checked:
    """What was found, for which SDK and card, and what was converted.

    `folder` is that of the conversions, None where nothing was written.
    """

    path: Path
    target: Target
    findings: Sequence[ArtifactFinding]
    num_artifacts: int
    converted: Sequence[Conversion] = ()
    folder: Path | None = None

    @property
    def is_well(self) -> bool:
        """Whether nothing would be refused."""
        return not refused(self.findings)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        card = self.target.card
        return {
            "ok": self.is_well,
            "path": str(self.path),
            "artifacts": self.num_artifacts,
            "sdk_version": self.target.apps_text,
            "sku": card.name if card is not None else "",
            "findings": [{**asdict(one), "grade": one.grade.value} for one in self.findings],
            "converted": [{"file": one.place, "to": one.says} for one in self.converted],
            "folder": str(self.folder) if self.folder is not None else None,
        }


def check_step(asked: CheckAsked) -> Checked:
    """Look at what is at a path, and write what can be converted.

    Raises:
        UsageError: nothing is there that is known; a version or kind of card that nobody knows; a
            folder for conversions that is there already.
    """
    folder = asked.convert
    if folder is not None and os.path.lexists(folder):
        raise UsageError(f"{folder} is there already: name a new folder for what is converted.")
    target = _target(asked)
    artifacts = read_artifacts(asked.path)
    found = findings(artifacts, target)
    if folder is None:
        return Checked(asked.path, target, found, len(artifacts))
    made = {one.place: one for artifact in artifacts for one in conversions(artifact, target)}
    if made:
        _write(folder, list(made.values()))
    written = folder if made else None
    return Checked(asked.path, target, found, len(artifacts), list(made.values()), written)


def _write(folder: Path, files: Sequence[Conversion]) -> None:
    try:
        with locked(folder), building(folder) as made:
            for one in files:
                path = made / one.place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(one.text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}.") from error


def _target(asked: CheckAsked) -> Target:
    version = version_of(asked.sdk_version)
    if asked.sdk_version and not version:
        raise UsageError(
            f"--sdk-version is {shown(asked.sdk_version)}: give an Apps version, like 1.20."
        )
    card = named_card(asked.sku) if asked.sku else None
    if version and card is not None:
        return Target(version, card)
    sdk = find_sdk(asked.sdk, EmulatorOptions())
    return Target(version or sdk.version, card or next(iter(cards_of(sdk)), None))


def named_card(name: str) -> CardLimits:
    """The kind of card that somebody names: standard, pro, ultra, or qaic-util's word for it.

    Raises:
        UsageError: nobody knows it.
    """
    by_name = {card.name.lower(): card for card in CARDS.values()}
    card = by_name.get(name.lower()) or card_limits(name)
    if card is None:
        raise UsageError(f"--sku is {shown(name)}: give {', '.join(by_name)}.")
    return card


def as_folder(text: str | None) -> Path | None:
    """The folder for conversions, as it was given."""
    return user_path(text, "The folder for what is converted") if text else None
