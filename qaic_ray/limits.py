"""One table of what SDKs and cards can do: for `doctor`, for `compile`, and for placing programs.

Sources: the public hardware tables, the vendor's compile scripts, QEfficient's releases, and the
kernel's documentation of the qaic driver.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

Version = tuple[int, ...]


@dataclass(frozen=True)
class CardLimits:
    """One SoC of a kind of card; `watts` is of the board, which may have several SoCs."""

    name: str
    nsps: int
    dram_bytes: int
    socs: int
    watts: int


CARDS = {
    "PCIe": CardLimits("Standard", 14, 16308 * 2**20, 1, 75),
    "PCIe Pro": CardLimits("Pro", 16, 32692 * 2**20, 1, 75),
    "PCIe Ultra": CardLimits("Ultra", 16, 31391744 * 2**10, 4, 150),
}
"""By the word of `qaic-util` for the kind (`Sku Type`), as tools before Apps 1.21 spell it."""


def card_limits(sku: str) -> CardLimits | None:
    """What a kind of card has, by `qaic-util`'s word for it in any version's spelling."""
    return next((found for word, found in CARDS.items() if word.lower() == sku.lower()), None)


MAX_CORES = max(card.nsps for card in CARDS.values())
"""NSPs of the largest Cloud AI 100 SoC (Pro, Ultra)."""

ACTIVE_PROGRAMS = 16
"""Programs that can be active on an SoC at once: one for each DMA channel."""

CACHE_INDEX_BEFORE: Version = (1, 16)
"""SDKs before this run exports with `--io cache-index`; from it on the position-ids ones too."""
AI100_HW_VERSION_FROM: Version = (1, 21)
"""`-aic-hw-version=ai100` in place of `2.0`."""
NAMED_SPECIALIZATIONS_FROM: Version = (1, 22)
"""The compiler reads `{name, symbols}` specializations; older ones exit 255."""
EXTDATA_FROM: Version = (1, 22)
"""The compiler reads weights in a checkpoint's files (`com.qti.aisw.extdata`). Inferred."""

GOOD_PAIRS = frozenset({((1, 14), (1, 12))})
"""(Apps, Platform) of two releases that are known to work together: that of the DL2q images."""
OLDEST_APPS: Version = (1, 12)
"""Compilers before this know no `-retained-state`."""

DRIVER_TIMEOUTS = {
    "control_resp_timeout_s": (60, 250, "loading a large program"),
    "wait_exec_default_timeout_ms": (5000, 5000, "one inference"),
    "mhi_timeout_ms": (2000, 2000, "the link to the card"),
}
"""Parameters of the kernel module `qaic`: the default, the least for language models, of what."""

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
"""The versions of Python that qaic-ray runs on."""

RAY_FROM: Version = (2, 60)
RAY_TESTED: Version = (2, 60)
"""Some of Ray's private interfaces are used; this is the release that they were tested with."""
RAY_TOKENS_FROM: Version = (2, 61)
"""From this release every cluster wants a token, unless RAY_AUTH_MODE says otherwise."""


def too_many_cores(num_cores: int, most: int) -> str | None:
    """Why a program of so many NSPs cannot run on cards of `most`; None where it can."""
    if num_cores <= most:
        return None
    return (
        f"The variant needs {num_cores} NSPs, and the cards here have {most}: compile with at most "
        f"{most}."
    )


def is_pair(apps: Version, platform: Version) -> bool:
    """Whether Apps and Platform SDK are of one release, or known to work together."""
    return apps[:2] == platform[:2] or (apps[:2], platform[:2]) in GOOD_PAIRS


def version_of(text: str) -> Version:
    """The numbers that a version begins with: (2, 60, 0) of `2.60.0rc1`."""
    numbers = []
    for word in text.split("."):
        digits = word[: len(word) - len(word.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits[:18]))
    return tuple(numbers)
