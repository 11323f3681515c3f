"""The part of the option tree that says which machine: its SDK, what an emulated one is, its Ray.

`qaic_ray.options` has the rest, and these too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from qaic_ray.files.documents import read_object
from qaic_ray.option_schemas import one_of
from qaic_ray.option_types import PathText, Section, opt

CARDS = "Cards"
RAY = "Ray"

LIMITS = read_object(Path(__file__).parents[1] / "emulator" / "limits.json")
"""What the emulated SDK can be asked to be, as its folder says."""


class EmulatorOptions(Section):
    """What the emulated SDK is asked to be, where it takes the vendor's place."""

    cards: int = opt(
        LIMITS["cards"]["default"], "How many cards.", ge=1, le=LIMITS["cards"]["most"]
    )
    sku: Annotated[str, one_of(LIMITS["sku"]["known"])] = opt(
        LIMITS["sku"]["default"],
        f"The kind of card: {', '.join(LIMITS['sku']['known'])}.",
        sample="ultra",
    )
    apps_version: Annotated[str, one_of(LIMITS["apps_version"]["known"])] = opt(
        LIMITS["apps_version"]["default"],
        f"Version of the Apps SDK: {', '.join(LIMITS['apps_version']['known'])}.",
        sample="1.22",
    )
    numerics: Annotated[str, one_of(LIMITS["numerics"]["known"])] = opt(
        LIMITS["numerics"]["default"],
        "How emulated cards compute: exact, or fast, with activations of 8 bits.",
        sample="fast",
    )


class ClusterOptions(Section):
    """Which cluster."""

    GROUP: ClassVar[str] = RAY

    address: str | None = opt(
        None,
        "A running Ray cluster, in place of a local one for the command's time.",
        free=True,
        sample="auto",
    )


class LocalRayOptions(Section):
    """A Ray that is started on this machine."""

    GROUP: ClassVar[str] = RAY

    dashboard: bool = opt(True, "Start a local Ray with its dashboard.", free=True)
    keep_ray: bool = opt(False, "Leave a local Ray up: the next command starts at once.", free=True)


class RayOptions(LocalRayOptions, ClusterOptions):
    """A cluster, or a Ray of this machine."""


class SdkOptions(Section):
    """Which SDK."""

    GROUP: ClassVar[str] = CARDS

    sdk: PathText = opt(
        "auto",
        "auto, real, emulated, or an SDK folder.",
        metavar="NAME",
        environment=("QAIC_RAY_SDK",),
        free=True,
        sample="emulated",
    )
