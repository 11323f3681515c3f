"""Figures as people read them: the same in the terminal and on the page."""

from __future__ import annotations

NONE = "–"


def count_text(count: int) -> str:
    """1234567 -> 1,234,567."""
    return f"{count:,}"


def seconds_text(seconds: float) -> str:
    """Three figures: 12.3 µs, 123 ms, 1.23 s, 1,234 s; a dash for 0, where nothing was measured."""
    if seconds <= 0:
        return NONE
    if seconds < 0.9995e-3:
        return f"{_three_figures(seconds * 1e6)} µs"
    if seconds < 0.9995:
        return f"{_three_figures(seconds * 1e3)} ms"
    return f"{_three_figures(seconds)} s"


def rate_text(per_s: float | None) -> str:
    """Three figures, or a dash where nothing was measured."""
    return _three_figures(per_s) if per_s else NONE


def _three_figures(value: float) -> str:
    if value >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")
