"""What a Cloud AI 100 card of each kind is: its resources, its identity and its telemetry.

Sources: the public hardware tables (14 NSPs, 16308 MB and 75 W for a Standard card; 16 and
32692 MB for a Pro; four SoCs of 16 and 31391744 KB for an Ultra, whose SoCs take 31 W of the
board's 150). Serial numbers and sensor readings are simulated: plausible, and the same for the same
card at the same second. The SoCs of a board are peers: they share its serial and its power.
"""

from __future__ import annotations

import math
from typing import Dict, NamedTuple, Optional, Tuple

NUM_VCS = 16
"""DMA-bridge channels of an SoC: one for each active program."""

NUM_MCIDS = 3072
NUM_SEMAPHORES = 32
FIRST_DERIVED_QID = 100

PCI_BUS = 0x36
"""Bus number of card 0; the others follow."""

FREQUENCIES_HZ = {
    "ddr": 2_133_000_000,
    "compnoc": 1_450_000_000,
    "memnoc": 1_000_000_000,
    "sysnoc": 667_000_000,
}

_KIB = 1024
_SOC_POWER_SINCE = (1, 21)


class Sku(NamedTuple):
    """A kind of card. `code` is the firmware's SKU number, `label` the tools' word for it.

    Numbers are those of one SoC, but `tdp_watts`, which is the board's. `soc_tdp_watts` is known of
    an Ultra, and its share of the board inferred of the others.
    """

    code: int
    label: str
    num_nsps: int
    dram_bytes: int
    num_physical_channels: int
    tdp_watts: float
    soc_tdp_watts: float
    num_socs: int
    peak_tops: float


SKUS: Dict[str, Sku] = {
    "standard": Sku(2, "PCIe", 14, 16308 * _KIB * _KIB, 0, 75.0, 62.0, 1, 325.0),
    "pro": Sku(3, "PCIe Pro", 16, 32692 * _KIB * _KIB, 0, 75.0, 62.0, 1, 375.0),
    "ultra": Sku(5, "PCIe Ultra", 16, 31391744 * _KIB, 7, 150.0, 31.0, 4, 217.5),
}


class Telemetry(NamedTuple):
    """Simulated sensor readings, in the runtime's units."""

    soc_temperature_mc: int
    board_power_uw: int
    tdp_cap_uw: int
    soc_power_uw: int
    soc_tdp_cap_uw: int
    nsp_frequency_hz: int
    dram_bandwidth_kbps: float


def telemetry(
    sku: Sku, qid: int, num_busy_nsps: int, now_s: float, *, num_board_nsps: int
) -> Telemetry:
    """Readings of card `qid` with `num_busy_nsps` activated, at `now_s` seconds of the clock.

    `num_board_nsps` are activated on its whole board, which has one reading of power for all.
    """
    load = num_busy_nsps / sku.num_nsps
    board_load = num_board_nsps / (sku.num_nsps * sku.num_socs)
    drift = _drift(qid, now_s)
    watts = _watts(sku.tdp_watts, board_load, _drift(qid // sku.num_socs, now_s))
    celsius = 38.0 + 22.0 * load + 0.9 * drift + qid % 4
    return Telemetry(
        soc_temperature_mc=round(celsius * 1000),
        board_power_uw=round(watts * 1_000_000),
        tdp_cap_uw=round(sku.tdp_watts * 1_000_000),
        soc_power_uw=round(_watts(sku.soc_tdp_watts, load, drift) * 1_000_000),
        soc_tdp_cap_uw=round(sku.soc_tdp_watts * 1_000_000),
        nsp_frequency_hz=1_450_000_000 if num_busy_nsps else 595_200_000,
        dram_bandwidth_kbps=round(load * (41_000_000 + 900_000 * drift), 1) if load else 0.0,
    )


def _drift(number: int, now_s: float) -> float:
    return math.sin(2 * math.pi * (math.floor(now_s) / 60.0 + number / 7.0))


def _watts(most: float, load: float, drift: float) -> float:
    return 0.24 * most + 0.42 * most * load + 0.6 * drift


def tells_soc_power(version: Tuple[int, ...]) -> bool:
    """Whether that Apps SDK tells an SoC's power beside its board's, and spells the SKU anew."""
    return version >= _SOC_POWER_SINCE


def sku_label(sku: Sku, version: Tuple[int, ...]) -> str:
    """The tools' word for a SKU; the newer spelling is public of an Ultra alone."""
    return sku.label.replace("PCIe", "Pcie") if tells_soc_power(version) else sku.label


def pci_address(qid: int) -> str:
    """Where card `qid` sits on the bus, as `domain:bus:device.function`."""
    return f"0000:{PCI_BUS + qid:02x}:00.0"


def mhi_id(qid: int, parent: Optional[int] = None) -> int:
    """Number of the SoC on the MHI bus; a derived device has its `parent`'s."""
    return qid if parent is None else parent


def hardware_serial(qid: int) -> str:
    """The SoC's serial number."""
    return f"0x{0x1A5C0E00 + 0x11 * qid:08x}"


def board_serial(sku: Sku, qid: int) -> str:
    """The board's serial number; the SoCs of one Ultra board share it."""
    return f"01L21{30400 + qid // sku.num_socs:07d}"


def device_node(qid: int) -> str:
    """The device's file; derived devices have only a name."""
    return f"/dev/accel/accel{qid}" if qid < FIRST_DERIVED_QID else f"derived{qid}"


def image_version(image: str, version: Tuple[int, ...]) -> str:
    """A firmware or library image's version string."""
    numbers = (*version, 0)[:3]
    return f"{image}.AIC.{'.'.join(map(str, numbers))}"


def dram_unit(version: Tuple[int, ...]) -> Tuple[str, int]:
    """In which unit this Apps version tells DRAM, and its size in bytes."""
    return ("KB", _KIB) if version >= (1, 21) else ("MB", _KIB * _KIB)
