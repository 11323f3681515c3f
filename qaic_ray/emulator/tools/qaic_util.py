"""`qaic-util`: what the vendor's tool prints of the cards, to the letter.

Covered: -q, -d, -t, -j, -f, -s, -a, -V, -h. Telemetry is simulated. Where the closed tool's text is
not public, the open tool's is used.
"""

from __future__ import annotations

import getopt
import json
import sys
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..card import READY, Card, Machine
from ..card.faults import FaultFileError
from ..card.sku import (
    FIRST_DERIVED_QID,
    FREQUENCIES_HZ,
    NUM_MCIDS,
    NUM_SEMAPHORES,
    board_serial,
    device_node,
    dram_unit,
    hardware_serial,
    image_version,
    mhi_id,
    pci_address,
    sku_label,
    tells_soc_power,
)
from ..folder import FolderError

USAGE = """\
Usage: qaic-util [options]
  -d, --aic-device-id <id>                   AIC device ID. -d option can be used multiple times 
  -q, --query [-d QID]                       Query command to get device information, default All 
  -t, --table <refresh-rate-sec> [-d QID]    Display device information in tabular format. Data is refreshed
                                             after every <refresh-rate-sec>. Ctrl+C to exit
  -f, --filter <Field==Value>                Only devices whose field has this value
  -j, --json <path>                          Write device information to a JSON file
  -s, --soc-reset [-p PCI address]           Reset devices, default All
  -a, --enable-mdp                           Enable multi-device partitions
  -V, --version                              Version of the library
  -h, --help                                 help
"""  # noqa: E501, W291 - the vendor's text

_INVALID = 255
_STATUS_TO_TEXT = {0: "Initializing", 1: "Ready", 2: "Error"}
_SHORT = "d:qt:f:j:sp:aVh"
_LONG = [
    "aic-device-id=", "query", "table=", "filter=", "json=", "soc-reset", "enable-mdp", "version",
    "help",
]  # fmt: skip


class Query(NamedTuple):
    """A parsed command line."""

    qids: Tuple[int, ...] = ()
    refresh_s: int = 0
    field: str = ""
    json_path: str = ""
    pci: str = ""
    is_reset: bool = False
    is_mdp: bool = False
    is_version: bool = False


def main(argv: Sequence[str]) -> int:
    """Run the tool; its exit status."""
    request = _parse(argv)
    if request is None:
        print(USAGE, end="")
        return _INVALID
    try:
        machine = Machine.here()
        return _run(machine, request)
    except (FolderError, FaultFileError) as error:
        print(error, file=sys.stderr)
        return _INVALID


def _parse(argv: Sequence[str]) -> Optional[Query]:
    try:
        options, _ = getopt.gnu_getopt(list(argv), _SHORT, _LONG)
    except getopt.GetoptError as error:
        print(f"qaic-util: {error}", file=sys.stderr)
        return None
    request = Query()
    for name, value in options:
        if name in {"-h", "--help"}:
            return None
        request = request._replace(**_change(request, name, value))
    return request


def _change(request: Query, name: str, value: str) -> Dict[str, Any]:
    if name in {"-d", "--aic-device-id"}:
        return {"qids": (*request.qids, _atoi(value))}
    if name in {"-t", "--table"}:
        return {"refresh_s": _atoi(value)}
    flags = {"s": "is_reset", "a": "is_mdp", "V": "is_version", "q": ""}
    texts = {"f": "field", "j": "json_path", "p": "pci"}
    letter = {"--soc-reset": "s", "--enable-mdp": "a", "--version": "V", "--query": "q",
              "--filter": "f", "--json": "j"}.get(name, name[1:])  # fmt: skip
    if letter in texts:
        return {texts[letter]: value}
    return {flags[letter]: True} if flags[letter] else {}


def _atoi(text: str) -> int:
    return int(text) if text.lstrip("+-").isdigit() else 0


def _run(machine: Machine, request: Query) -> int:
    if request.is_version:
        print("\n".join(_library(machine)))
        return 0
    cards = {card.qid: card for card in machine.cards()}
    for qid in request.qids:
        if qid not in cards:
            print(f"Device {qid} invalid", file=sys.stderr)
            return _INVALID
    chosen = [cards[qid] for qid in request.qids or cards]
    if request.pci:
        chosen = [card for card in chosen if pci_address(card.qid) == request.pci]
    if request.field:
        chosen = [card for card in chosen if _has(machine, card, request.field)]
    if request.is_reset:
        for card in chosen:
            machine.set_status(card.qid, READY)
        return 0
    if request.is_mdp:
        return 0
    if request.json_path:
        return _write_json(machine, chosen, request.json_path)
    if request.refresh_s > 0:
        return _watch(machine, [card.qid for card in chosen], request.refresh_s)
    print("\n".join([*_library(machine), f"Number of devices: {len(chosen)}"]))
    for card in chosen:
        print("\n\t".join(lines(machine, card, time.time())))
    return 0


def _library(machine: Machine) -> List[str]:
    version = image_version("LRT", machine.folder.version)
    return [f"LRT QC_IMAGE_VERSION:{version}", "LRT IMAGE_VARIANT:LRT.AIC.REL"]


def _has(machine: Machine, card: Card, condition: str) -> bool:
    field, _, value = condition.partition("==")
    return f"{field.strip()}:{value.strip()}" in lines(machine, card, time.time())


def lines(machine: Machine, card: Card, now_s: float) -> List[str]:
    """What `-q` prints of one card; every line after the first is indented by a tab."""
    is_derived = card.qid >= FIRST_DERIVED_QID
    address = "0000:00:00.0" if is_derived else pci_address(card.qid)
    info = "" if is_derived else "Processing accelerators Qualcomm Device a100"
    head = [
        f"QID {card.qid}",
        f"Status:{_STATUS_TO_TEXT[card.status]}",
        f"MHI ID:{mhi_id(card.qid, card.parent)}",
        f"PCI Address:{address}",
        f"PCI Info:{info}",
        f"Dev Link:{device_node(card.qid)} ",
    ]
    if card.status != READY:
        return head
    known = head + _firmware(machine, card) + _resources(machine, card, now_s)
    return known + _tail(card, now_s, machine.folder.version)


def _firmware(machine: Machine, card: Card) -> List[str]:
    version = machine.folder.version
    number = ".".join(map(str, (*version, 0)[:3]))
    return [
        "Device Capabilities:HybridBoot+ MDP+",
        "HW Version:2.0.0.0",
        f"HW Serial:{hardware_serial(card.qid)}",
        f"FW Version:{number}",
        f"FW QC_IMAGE_VERSION:{image_version('QSM', version)}",
        "FW OEM_IMAGE_VERSION:",
        "FW IMAGE_VARIANT:AIC100.REL",
        f"NSP Version:{number}",
        f"NSP QC_IMAGE_VERSION:{image_version('NSP', version)}",
        "NSP OEM_IMAGE_VERSION:",
        "NSP IMAGE_VARIANT:NSP.AIC.REL",
    ]


def _resources(machine: Machine, card: Card, now_s: float) -> List[str]:
    unit, unit_bytes = dram_unit(machine.folder.version)
    sensors = card.telemetry(now_s)
    frequencies = {"NSP": sensors.nsp_frequency_hz}
    frequencies.update((name.upper(), hz) for name, hz in FREQUENCIES_HZ.items())
    return [
        f"Dram Total:{card.total.dram_bytes // unit_bytes} {unit}",
        f"Dram Free:{card.free.dram_bytes // unit_bytes} {unit}",
        "Dram Fragmentation:0.00%",
        f"Vc Total:{card.total.num_vcs}",
        f"Vc Free:{card.free.num_vcs}",
        f"Pc Total:{card.sku.num_physical_channels}",
        "Pc Reserved:0",
        f"Nsp Total:{card.total.num_nsps}",
        f"Nsp Free:{card.free.num_nsps}",
        f"Last 100ms Average Dram Bw:{_number(sensors.dram_bandwidth_kbps)} KBps",
        f"MCID Total:{NUM_MCIDS}",
        f"MCID Free:{NUM_MCIDS}",
        f"Semaphore Total:{NUM_SEMAPHORES}",
        f"Semaphore Free:{NUM_SEMAPHORES}",
        f"Constants Loaded:{card.num_loaded}",
        f"Constants In-Use:{card.num_active}",
        f"Networks Loaded:{card.num_loaded}",
        f"Networks Active:{card.num_active}",
        *(f"{name} Frequency(Mhz):{hz / 1e6:.2f}" for name, hz in frequencies.items()),
    ]


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _tail(card: Card, now_s: float, version: Tuple[int, ...]) -> List[str]:
    sensors = card.telemetry(now_s)
    power = [("Board power", sensors.board_power_uw), ("TDP Cap", sensors.tdp_cap_uw)]
    if tells_soc_power(version):
        power[1] = "Board TDP Cap", sensors.tdp_cap_uw
        power += [("SOC power", sensors.soc_power_uw), ("SOC TDP Cap", sensors.soc_tdp_cap_uw)]
    return [
        "Metadata Version:0.10",
        "NNC Command Protocol Version:8.1",
        "SBL Image:",
        "PVS Image Version:0",
        "NSP Defective PG Mask: 0x0",
        f"Sku Type:{sku_label(card.sku, version)}",
        f"Board serial:{board_serial(card.sku, card.qid)}",
        f"SoC temperature(degree C):{sensors.soc_temperature_mc / 1e3:.2f}",
        *(f"{name}(Watts):{microwatts / 1e6:.2f}" for name, microwatts in power),
    ]


def _write_json(machine: Machine, cards: Sequence[Card], path: str) -> int:
    devices = []
    _, unit_bytes = dram_unit(machine.folder.version)
    for card in cards:
        devices.append(
            {
                "qid": card.qid,
                "dev_status": _STATUS_TO_TEXT[card.status],
                "mhi_id": mhi_id(card.qid, card.parent),
                "sku_type": sku_label(card.sku, machine.folder.version),
                "pci_address": pci_address(card.qid),
                "hw_serial": hardware_serial(card.qid),
                "board_serial": board_serial(card.sku, card.qid),
                "nsp_total": card.total.num_nsps,
                "nsp_free": card.free.num_nsps,
                "dram_total": card.total.dram_bytes // unit_bytes,
                "dram_free": card.free.dram_bytes // unit_bytes,
            }
        )
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"device_info": devices}, file, indent=2)
    except OSError as error:
        print(f"Failed to open file: {path}: {error.strerror}", file=sys.stderr)
        return _INVALID
    return 0


def _watch(machine: Machine, qids: Sequence[int], refresh_s: int) -> int:
    """The table, every `refresh_s` seconds until Ctrl+C; once where there is no terminal."""
    is_terminal = sys.stdout.isatty()
    try:
        while True:
            if is_terminal:
                print("\x1b[2J\x1b[H", end="")
            print(table(machine, qids, time.time()), flush=True)
            if not is_terminal:
                return 0
            time.sleep(refresh_s)
    except KeyboardInterrupt:
        return 0


def table(machine: Machine, qids: Sequence[int], now_s: float) -> str:
    """What `-t` shows of these cards."""
    stamp = time.strftime("year %Y month %m day %d - %H:%M:%S", time.localtime(now_s))
    library = image_version("LRT", machine.folder.version)
    rows = [f"Date & time: {stamp}  ---  LRT Image Version: {library}"]
    cards = {card.qid: card for card in machine.cards()}
    for qid in qids:
        card = cards.get(qid)
        if card is None or card.status != READY:
            rows.append(f"DeviceID-{qid} --- Status: Invalid --- FW Version: Invalid")
            continue
        number = ".".join(map(str, (*machine.folder.version, 0)[:3]))
        rows.append(f"DeviceID-{qid} --- Status: Ready --- FW Version: {number}")
        rows += [f"  {name + ':':<20}{value}" for name, value in _cells(machine, card, now_s)]
    return "\n".join(rows)


def _cells(machine: Machine, card: Card, now_s: float) -> List[Tuple[str, str]]:
    unit, unit_bytes = dram_unit(machine.folder.version)
    sensors = card.telemetry(now_s)
    total = card.total.dram_bytes // unit_bytes
    used = total - card.free.dram_bytes // unit_bytes
    power = sensors.board_power_uw / 1e6, sensors.tdp_cap_uw / 1e6
    return [
        ("NSP Used / Total", f"{card.num_busy_nsps} / {card.total.num_nsps}"),
        ("NW Loaded / Active", f"{card.num_loaded} / {card.num_active}"),
        ("DRAM Used / Total", f"{used} {unit} / {total} {unit}"),
        ("DRAM Bandwidth", f"{sensors.dram_bandwidth_kbps:.2f} KBps"),
        ("NSP Frequency", f"{sensors.nsp_frequency_hz / 1e6:.2f} Mhz"),
        ("DDR Frequency", f"{FREQUENCIES_HZ['ddr'] / 1e6:.2f} Mhz"),
        ("Temperature", f"{sensors.soc_temperature_mc / 1e3:.2f} C"),
        ("Power / TDP Cap", f"{power[0]:.2f} W / {power[1]:.2f} W"),
    ]
