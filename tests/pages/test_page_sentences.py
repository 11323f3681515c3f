"""What pages quote of errors, under "What can go wrong", is what the code says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from page_blocks import GENERATED, ROOT, name_of, pages

LEAST = 10
"""Shorter parts of a sentence could be of any."""

_HEAD = "## What can go wrong\n"
_OTHERS = ("InvalidAuthToken",)
"""Of programs that are not ours."""


@cache
def said_in_the_code() -> frozenset[str]:
    """The fixed parts of all texts in the package."""
    found = set()
    for path in (ROOT / "qaic_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(" ".join(node.value.split()))
    return frozenset(part for part in found if len(part) >= LEAST)


def quoted(page: Path) -> Iterator[str]:
    """The sentences of a page's table: what is quoted, of four words and more."""
    text = page.read_text(encoding="utf-8").partition(_HEAD)[2].partition("\n## ")[0]
    for line in text.splitlines():
        if line.startswith("| "):
            first = re.split(r"(?<!\\) \| ", line.removeprefix("| "))[0]
            for sentence in re.findall(r"``?(.+?)``?(?!`)", first):
                if len(sentence.split()) >= 4:
                    yield sentence


def share_said(sentence: str) -> float:
    """How much of it the code has as fixed text, of what is not left out."""
    whole = sentence.replace("...", " ").strip()
    known = [False] * len(whole)
    for part in said_in_the_code():
        at = whole.find(part[:LEAST])
        if at >= 0:
            same = _beginning(part, whole[at:])
            known[at : at + same] = [True] * same
        # The sentence begins within a text.
        for piece in (cut.strip() for cut in sentence.split("...")):
            if len(piece) >= LEAST and piece in part:
                at = whole.find(piece)
                known[at : at + len(piece)] = [True] * len(piece)
    return sum(known) / max(1, len(whole))


def _beginning(one: str, other: str) -> int:
    """How many characters two texts have in common from their first on."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("page", [p for p in pages() if GENERATED not in p.parents], ids=name_of)
def test_a_sentence_of_a_page_is_one_of_the_code(page: Path) -> None:
    other = [s for s in quoted(page) if share_said(s) < 0.5 and s not in _OTHERS]
    assert other == []


def test_sentences_are_found_and_told_apart() -> None:
    assert sum(len(list(quoted(page))) for page in pages()) > 30
    assert share_said("There is no prompts file prompts.jsonl.") > 0.5
    assert share_said("There was never a file of this name, my friend.") < 0.5
