"""The cheap checks of artifacts before a compile: headers, shapes and flags, no shape inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from qaic_ray.compile.store import BuildRequest, is_current
from qaic_ray.errors import DeviceError, UsageError
from qaic_ray.limits import CardLimits, card_limits
from qaic_ray.sdk import Sdk

if TYPE_CHECKING:
    from qaic_ray.check.facts import ArtifactFinding

Pick = Callable[[Iterable[CardLimits]], CardLimits]


def size_of_card(card: CardLimits) -> tuple[int, int]:
    """What cards are ordered by: NSPs, then memory."""
    return card.nsps, card.dram_bytes


def cards_of(sdk: Sdk) -> list[CardLimits]:
    """The kinds of this machine's cards, the smallest first; none on one that only compiles."""
    try:
        devices = sdk.devices()
    except DeviceError:
        return []
    known = {card for device in devices if (card := card_limits(device.sku)) is not None}
    return sorted(known, key=size_of_card)


def check_builds(requests: Sequence[BuildRequest]) -> list[ArtifactFinding]:
    """What is found of compiles that are still to be done; remarks, for a refusal is raised.

    Raises:
        UsageError: the compiler, or every card of this machine, would refuse one of them.
    """
    fresh = [request for request in requests if not is_current(request.target, request.entries)]
    if not fresh:
        return []
    # Here, because who finds everything compiled needs no onnx.
    from qaic_ray.check.artifacts import of_compile
    from qaic_ray.check.checks import findings, refused
    from qaic_ray.check.facts import Target
    from qaic_ray.check.reading.documents import command_of

    sdk = fresh[0].sdk
    target = Target(sdk.version, next(reversed(cards_of(sdk)), None))
    artifacts = []
    for request in fresh:
        variant, place = request.variant, request.store
        words = variant.argv(sdk, place, place)[1:]
        artifacts.append(
            of_compile(
                variant.source.onnx,
                variant.source.custom_io,
                symbols=[entry.symbols() for entry in variant.specializations.entries],
                command=command_of(words, variant.label),
            )
        )
    found = findings(artifacts, target)
    for one in refused(found):
        raise UsageError(f"{one.place}: {one.says} {one.remedy}")
    return found
