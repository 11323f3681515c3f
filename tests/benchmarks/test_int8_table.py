"""`benchmarks/int8.py` measures what it says, and fails where a way loses too much."""

from __future__ import annotations

import json

import pytest
from benchmark_modules import benchmark_module


@pytest.mark.parametrize(("most", "status"), [(0.01, 0), (-1.0, 1)])
def test_the_table_of_int8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], most: float, status: int
) -> None:
    int8 = benchmark_module("int8")
    monkeypatch.setattr(int8, "FLAGS", {"asymmetric": int8.FLAGS["asymmetric"]})
    monkeypatch.setattr(int8, "MOST_LOST", most)
    assert int8.main() == status
    shown = capsys.readouterr().out
    measured = json.loads(shown.splitlines()[-1])
    rows = measured["rows"]
    assert list(rows) == ["fp32", "asymmetric", "random data", "a float16 model"]
    assert ("random data" not in measured["failed"], len(measured["failed"])) == (
        True,
        3 if status else 0,
    )
    assert rows["fp32"]["relative_error"] < 1e-5 < rows["asymmetric"]["relative_error"] < 0.02
    assert rows["random data"]["relative_error"] > 10 * rows["asymmetric"]["relative_error"]
    assert 3.9 < rows["fp32"]["constants_bytes"] / rows["asymmetric"]["constants_bytes"] < 4.1
    for way, row in rows.items():
        assert f"{row['accuracy']:.2%}" in next(line for line in shown.splitlines() if way in line)
