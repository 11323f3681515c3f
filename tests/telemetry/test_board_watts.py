"""The power of boards, read from what `qaic-util -q` prints."""

from __future__ import annotations

import pytest

from qaic_ray.sdk import parse_lines
from qaic_ray.telemetry.card_lines import board_watts


def said(qid: int, board: str, watts: str) -> str:
    lines = (f"Status:Ready\n\tBoard serial:{board}", f"Board power(Watts):{watts}")
    return f"QID {qid}\n\t" + "\n\t".join(lines) + "\n"


@pytest.mark.parametrize(
    ("qids", "expected"),
    [
        ((0, 1, 2, 3), {"A": 41.5, "B": 30.0}),  # two cards of one board have one reading
        ((2,), {"B": 30.0}),
        ((3,), {}),  # 0 is a reading that failed
        ((), {}),
    ],
)
def test_a_board_is_read_once(qids: tuple[int, ...], expected: dict[str, float]) -> None:
    text = said(0, "A", "41.5") + said(1, "A", "41.5") + said(2, "B", "30") + said(3, "C", "0.00")
    assert board_watts(parse_lines(text), qids) == expected


def test_a_tool_that_tells_no_power_gives_none() -> None:
    assert board_watts(parse_lines("QID 0\n\tStatus:Ready\n"), (0,)) == {}
    assert board_watts(parse_lines(said(0, "A", "unknown")), (0,)) == {}
    assert board_watts(parse_lines(said(0, "", "12.25 W")), (0,)) == {"QID 0": 12.25}
