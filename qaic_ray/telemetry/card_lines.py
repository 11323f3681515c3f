"""From the lines of `qaic-util -q` to the values of a card's metrics, in base units."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from qaic_ray.telemetry.names import CARD_INFO_LINES, CARD_READINGS, CARD_STATUS, Metric

_VALUE = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)")
# The tool writes DRAM in MB or, from 1.21 on, in KB; bandwidth in KBps.
_SCALE = {"KB": 2.0**10, "MB": 2.0**20, "GB": 2.0**30, "KBps": 2.0**10, "%": 0.01}
_MHZ = "(Mhz)"
BOARD_POWER_LINE = "Board power(Watts)"
_STATUS = {"initializing": 0, "ready": 1}
_ERROR = 2
# From 1.21 on the board's cap has the board in its name, because an SoC's stands beside it.
_NEWER = {"TDP Cap(Watts)": "Board TDP Cap(Watts)"}


def card_readings(lines: Mapping[str, str]) -> dict[Metric, float]:
    """The value of each metric that a card's lines tell of."""
    status = lines.get(CARD_STATUS.line, "").lower()
    found: dict[Metric, float] = {CARD_STATUS: _STATUS.get(status, _ERROR)}
    for metric in CARD_READINGS:
        line = metric.line
        text = lines.get(line) or lines.get(_NEWER.get(line, ""), "")
        match = _VALUE.match(text)
        if match is not None:
            scale = 1e6 if line.endswith(_MHZ) else _SCALE.get(match[2], 1.0)
            found[metric] = float(match[1]) * scale
    return found


def card_info(lines: Mapping[str, str]) -> dict[str, str]:
    """The tags of `qaic_device_info` beside the card's id."""
    return {tag: lines.get(line, "") for tag, line in CARD_INFO_LINES.items()}


def board_watts(cards: Mapping[str, Mapping[str, str]], qids: Container[int]) -> dict[str, float]:
    """The power of the boards that these cards are on, by serial number, where there is a reading.

    A board of several cards has one reading, which all of them show; one of 0 has failed.
    """
    watts: dict[str, float] = {}
    for qid, lines in cards.items():
        match = _VALUE.match(lines.get(BOARD_POWER_LINE, ""))
        if match and qid.isdecimal() and int(qid) in qids and float(match[1]) > 0:
            watts[lines.get("Board serial") or f"QID {qid}"] = float(match[1])
    return watts
