"""Each situation is found and named, with a remedy and a source, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from situations import ALL, Situation

from qaic_ray.check.artifacts import read_artifacts
from qaic_ray.check.checks import findings
from qaic_ray.check.facts import Target
from qaic_ray.check.rules import RULES
from qaic_ray.limits import CARDS, version_of

SKUS = {card.name.lower(): card for card in CARDS.values()}


@pytest.mark.parametrize("name", ALL)
def test_a_situation_is_found_and_nothing_else(name: str, tmp_path: Path) -> None:
    one: Situation = ALL[name]
    path = one.make(tmp_path)
    target = Target(version_of(one.apps), SKUS[one.sku])
    found = findings(read_artifacts(path), target)
    assert {each.rule for each in found} == set(one.rules), found
    assert one.says in " ".join(f"{each.says} {each.remedy}" for each in found), found
    for each in found:
        assert each.remedy
        assert each.source
        assert each.place


def test_there_are_forty_of_them() -> None:
    assert len(ALL) >= 40


def test_every_rule_has_a_situation_or_a_test_of_its_own() -> None:
    of_situations = {rule for one in ALL.values() for rule in one.rules}
    elsewhere = {"onnx-too-large", "context-beyond-model", "export-changed", "program-changed"}
    elsewhere |= {"model-moved"}
    assert of_situations | elsewhere == set(RULES)


def test_the_page_has_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "check.md").read_text()
    rows = [f"| `{name}` | {rule.grade.value} | {rule.source} |" for name, rule in RULES.items()]
    assert [row for row in rows if row not in page] == []
