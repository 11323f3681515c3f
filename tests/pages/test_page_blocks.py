"""Every block of every page is read, and what it names is there; and the reading itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_check import check_commands, check_text, command_words
from page_blocks import GENERATED, NOTES, ROOT, Block, PageError, blocks_of, name_of, pages, parse

KINDS = {
    "sh", "console", "python", "yaml", "json", "jsonl", "text", "csv", "mermaid", "promql", "lark",
}  # fmt: skip
HERE = ROOT / "docs" / "page.md"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_page_names_what_is_there(page: Path) -> None:
    """Each command is known, each flag, each value; programs and files are whole."""
    files: list[str] = []
    for block in blocks_of(page):
        assert block.kind in KINDS, f"{block.place}: a block of kind {block.kind!r}"
        check_commands(block, files)
        check_text(block)
        if block.file is not None:
            files.append(block.file)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_reader_sees_why_a_block_is_not_run(page: Path) -> None:
    for block in blocks_of(page):
        if "not run" in block.notes and GENERATED not in page.parents:
            reason = block.notes["not run"]
            assert reason, block.place
            assert reason.lower() in block.lead.lower(), f"{block.place}: {block.lead!r}"


def test_examples_say_commands_that_there_are() -> None:
    for example in sorted((ROOT / "examples").iterdir()):
        lines = example.read_text(encoding="utf-8").splitlines()
        typed = [line for line in lines if line.startswith("qaic-ray ")]
        block = Block(example, 1, "sh", "".join(f"{line}\n" for line in typed))
        check_commands(block, [])
        if example.suffix == ".py":
            check_text(Block(example, 1, "python", example.read_text(encoding="utf-8")))


def test_a_file_a_console_and_a_note_are_read() -> None:
    text = (
        "Words.\n\nSave this as `mine.yaml`:\n\n```yaml\nname: mine\n```\n"
        "It needs a card\nof yours.\n<!-- not run: a card -->\n<!-- exit code: 2 -->\n"
        "```console\n$ qaic-ray run \\\n    m\nanswer\n$ ls\n```\n"
    )
    saved, typed = parse(text, HERE)
    assert (saved.file, saved.kind, saved.text, saved.line) == (
        "mine.yaml",
        "yaml",
        "name: mine\n",
        5,
    )
    assert typed.notes == {"not run": "a card", "exit code": "2"}
    assert typed.lead == "It needs a card of yours."
    assert not typed.is_run
    assert [(c.text, c.shown) for c in typed.commands] == [
        ("qaic-ray run \\\n    m", ("answer",)),
        ("ls", ()),
    ]


@pytest.mark.parametrize(
    "text", ["```sh\nls\n", "<!-- unknown: x -->\n```sh\nls\n```\n"], ids=["open", "unknown note"]
)
def test_a_page_that_is_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(PageError):
        parse(text, HERE)
    assert "unknown" not in NOTES


def test_the_words_of_commands_are_found() -> None:
    text = (
        "export A=1 B=2\nA=1 qaic-ray run m 'a | b' > out 2>&1 && ls | wc -l  # why\n"
        "cat > f <<'END'\nqaic-ray nothing\nEND\n"
        'eval "$(qaic-ray ray env)"\n'
        "until qaic-ray run --resume; do :; done\n"
    )
    assert list(command_words(text)) == [
        ["export", "A=1", "B=2"],
        ["qaic-ray", "run", "m", "a | b"],
        ["ls"],
        ["wc", "-l"],
        ["cat"],
        ["eval", "$(qaic-ray ray env)"],
        ["qaic-ray", "ray", "env"],
        ["qaic-ray", "run", "--resume"],
        [":"],
        ["done"],
    ]


@pytest.mark.parametrize(
    "line",
    [
        "qaic-ray rum m",
        "qaic-ray run m --max-tokenz 3",
        "qaic-ray compile m mx7",
        "qaic-ray run m --temperature hot",
        "qaic-ray launch smollm2 --set run.nothing=1",
        "make nothing",
        "scripts/nothing",
        "pip install 'qaic-ray[nothing]'",
        "python nothing.py",
    ],
)
def test_what_is_not_there_is_found(line: str) -> None:
    with pytest.raises(AssertionError):
        check_commands(Block(HERE, 1, "sh", f"{line}\n"), [])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("python", "from qaic_ray import Nothing\n"),
        ("python", "import qaic_ray\nqaic_ray.nothing()\n"),
        ("python", "def\n"),
        ("json", "{"),
        ("jsonl", "{}\n{\n"),
        ("yaml", "a: [\n"),
    ],
)
def test_a_text_that_is_not_whole_is_found(kind: str, text: str) -> None:
    with pytest.raises(AssertionError):
        check_text(Block(HERE, 1, kind, text))
