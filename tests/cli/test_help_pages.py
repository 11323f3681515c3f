"""The rules of help pages: they fit, cut no word, show each option once, and examples run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_lines import all_names, context_of, examples_of, is_group, of_name, words_of
from run_folders import FolderMaker
from shard_drivers import drive, run_of
from small_graphs import write_decoder
from typer.testing import CliRunner

from qaic_ray.bundles.record import BundleWriter
from qaic_ray.cli import main
from qaic_ray.cli.commands import app
from qaic_ray.cli.flags.page import HelpEntry, HelpPage, page_text
from qaic_ray.contract import Specializations
from qaic_ray.errors import UsageError

ROOT = Path(__file__).parents[2]
WIDTHS = (60, 80, 120)
RUN = "smollm2-20261129-090500"
"""The run that examples name."""

NAMES = all_names()
EXAMPLES = [(name, example) for name in NAMES for example in examples_of(name)]
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def page_at(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    return str(context_of(name).get_help())


def entries_of(name: str) -> list[HelpEntry]:
    page = of_name(name).page(context_of(name))
    return [entry for _, entries in page.panels for entry in entries]


def names_of(text: str) -> Iterator[str]:
    """The options and arguments that a page explains, from its left column."""
    for line in text.splitlines():
        if re.match(r"  \S", line) and not line.startswith(("  qaic-ray", "  eval")):
            column = re.split(r"\s{2,}", line.strip())[0]
            yield from (part.split()[0] for part in column.split(", "))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_and_cuts_nothing(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page_at(name, width, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "<bool>" not in text
    shown = {word.rstrip(",") for word in text.split()} | set(text.split())
    for entry in entries_of(name):
        said = " ".join([*entry.names, entry.text, *(f"[{note}]" for note in entry.notes)])
        assert set(said.split()) <= shown, entry
    assert set(of_name(name).help.split()) <= shown


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_every_option_once_and_no_underscores(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page_at(name, 80, monkeypatch)
    assert not re.search(r"--\w+_", text)
    names = list(names_of(text))
    assert len(names) == len(set(names))
    for param in of_name(name).get_params(context_of(name)):
        if param.param_type_name == "option" and not param.hidden:
            learnt = param.opts[:1] if param.opts else param.secondary_opts[:1]
            assert set(learnt) <= set(names)
            assert set(param.secondary_opts[:1]) <= set(names)
            also = {word for word in param.opts if word not in names}
            assert all(word in text for word in also), also
    if is_group(of_name(name)):
        assert set(of_name(name).commands) <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_examples_of_its_command(name: str) -> None:
    examples = examples_of(name)
    assert 1 <= len(examples) <= 3
    if name:
        assert all(words_of(example)[: len(name.split())] == name.split() for example in examples)


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[e for _, e in EXAMPLES])
def test_an_example_is_understood(name: str, example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the call of the function, with every section checked; the function is not run."""
    words = words_of(example)
    if words[0] == "help":
        assert CliRunner().invoke(app, words).exit_code == 0
        return
    command, depth = of_name(""), 0
    while is_group(command):
        command, depth = command.commands[words[depth]], depth + 1
    called: list[dict[str, Any]] = []
    call = command._call
    monkeypatch.setattr(call, "_function", lambda **arguments: called.append(arguments))
    context = command.make_context("qaic-ray", words[depth:])
    context.command.invoke(context)
    assert len(called) == 1


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    for path in (f"runs/{RUN}", "runs/before", "runs/after", "elsewhere/one"):
        FolderMaker(folder / path).session(3)
    (folder / "runs" / RUN / "logs").mkdir()
    (folder / "runs" / RUN / "logs" / "card-0.log").write_text("opened\n")
    (folder / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    for shard in ("1/2", "2/2"):
        made = drive(run_of(folder / "made", prompts=str(folder / "p.jsonl"), shard=shard)).folder
        shutil.copytree(made, folder / "shards" / made.name)
    for bundle in ("runs/a/bundles/card-0", "runs/b/bundles/card-0", "bundle", "fp32-bundle"):
        (folder / bundle).parent.mkdir(parents=True, exist_ok=True)
        BundleWriter(folder / bundle, 1, {}).add({"x": np.zeros(2)}, {"y": np.zeros(2)})
    (folder / "my_program.py").write_text("import qaicrt\n")
    (folder / "smollm2-135m-kv" / "generatedModels").mkdir(parents=True)
    write_decoder(folder / "smollm2-135m-kv" / "generatedModels" / "smollm2.onnx")
    shapes = Specializations.build(batch_size=1, prompt_len=8, ctx_len=64, continuous=False)
    (folder / "specializations.json").write_text(shapes.to_json(named=False))
    return folder


# What takes a model, a Ray or long: other tests run these.
DEAR = (
    "run",
    "serve",
    "demo",
    "launch",
    "export",
    "compile",
    "stop",
    "ray show",
    "ray env",
    "ray stop",
)
DEAR_OPTIONS = re.compile(r"--watch|--try-cards|s3://")
CHEAP = {
    example: None
    for name, example in EXAMPLES
    if name not in ("", "ray", *DEAR) and not DEAR_OPTIONS.search(example)
}


FIRST = {name: example for name, example in reversed(EXAMPLES) if example in CHEAP}
"""The first cheap example of each command."""


def at_home(home: Path, here: Path) -> dict[str, str]:
    """Variables of somebody who has a home, and nothing set."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(home),
        "QAIC_RAY_CACHE": str(here / "cache"),
        "QAIC_RAY_LOCKS": str(here / "locks"),
    }


@pytest.mark.parametrize("example", dict.fromkeys(FIRST.values()))
def test_the_first_cheap_example_of_a_command_runs(
    example: str, here: Path, tmp_path: Path
) -> None:
    """As a shell would have it."""
    done = subprocess.run(
        ["bash", "-c", example], cwd=here, env=at_home(tmp_path, here), capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "--json" in example:
        assert isinstance(json.loads(done.stdout), dict)


@pytest.mark.parametrize("example", [e for e in CHEAP if e not in FIRST.values()])
def test_another_cheap_example_runs(
    example: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As the same program takes the words that a shell would hand it."""
    monkeypatch.chdir(here)
    for name in [name for name in os.environ if name.startswith(("QAIC_", "RAY_", "XDG_"))]:
        monkeypatch.delenv(name)
    for name, value in at_home(tmp_path, here).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["qaic-ray", *words_of(example)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    assert not end.value.code, err
    if "--json" in example:
        assert isinstance(json.loads(out), dict)


def test_commands_stand_in_the_order_of_use() -> None:
    page = of_name("").page(context_of(""))
    names = [entry.names[0] for title, entries in page.panels[:4] for entry in entries]
    wanted = [
        "run",
        "serve",
        "demo",
        "init",
        "launch",
        "plan",
        "schema",
        "export",
        "compile",
        "check",
        "report",
        "merge",
        "compare",
        "runs",
    ]
    wanted += ["status", "logs", "show", "stop", "devices", "doctor"]
    there = [name for name in wanted if name in of_name("").commands]
    assert names[: len(there)] == there
    assert set(names) == set(of_name("").commands)


def test_options_of_run_stand_in_the_order_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(names_of(page_at("run", 80, monkeypatch)))
    wanted = ["MODEL", "--qpc", "--prompt", "--input", "--max-tokens", "--stop", "--temperature"]
    wanted += ["--device-id", "--sdk", "--address", "--output", "--resume", "--stream", "--json"]
    wanted += ["--verbose", "--log-format", "--help"]
    assert sorted(wanted, key=names.index) == wanted
    assert names[-1] == "--help"


def test_what_is_said_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(page_at("run", 80, monkeypatch).split())
    assert "--temperature NUMBER Divides the logits; 0 is greedy. [default: 0]" in text
    assert "[env: QAIC_RAY_SDK] [default: auto]" in text
    assert "--metrics, --no-metrics Export metrics" in text
    text = " ".join(page_at("compile", 80, monkeypatch).split())
    assert "[default: mx6]" in text
    text = " ".join(page_at("status", 80, monkeypatch).split())
    assert "[env: RAY_API_SERVER_ADDRESS, RAY_ADDRESS]" in text


def test_a_terminal_gets_colours_and_no_color_none(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = HelpEntry(("-o", "--output PATH"), "Where.", ("default: runs",))
    page = HelpPage(
        "qaic-ray x [OPTIONS]", "Do it.", ("qaic-ray x -o y",), (("Options", (entry,)),)
    )
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = page_text(page, 60)
    assert "\x1b[1mOptions:\x1b[0m" in coloured
    monkeypatch.setenv("TERM", "dumb")
    assert page_text(page, 60) == ESCAPE.sub("", coloured)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert page_text(page, 60) == ESCAPE.sub("", coloured)


def test_a_long_example_is_broken_as_a_shell_takes_it() -> None:
    example = 'qaic-ray run m "a text of several words" --max-tokens 64 --temperature 0.7 -o runs'
    text = ESCAPE.sub("", page_text(HelpPage("qaic-ray run", "", (example,), ()), 50))
    lines = text[text.index("  qaic-ray run m") :]
    assert max(map(len, lines.splitlines())) <= 50
    joined = subprocess.run(
        ["bash", "-c", f"qaic-ray() {{ printf '%s|' \"$@\"; }}\n{lines}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert joined.stdout.split("|")[:-1] == words_of(example)


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["help"], "qaic-ray [OPTIONS] COMMAND ..."),
        (["help", "run"], "qaic-ray run [OPTIONS] [MODEL] [PROMPT]"),
        (["help", "emulator", "run"], "qaic-ray emulator run [OPTIONS] COMMAND"),
        (["emulator", "help"], "qaic-ray emulator [OPTIONS] COMMAND ..."),
        (["-h"], "qaic-ray [OPTIONS] COMMAND ..."),
    ],
)
def test_guesses_at_the_help_are_right(words: list[str], usage: str) -> None:
    result = CliRunner().invoke(app, words, prog_name="qaic-ray", env={"COLUMNS": "80"})
    assert (result.exit_code, result.output.splitlines()[0]) == (0, f"Usage: {usage}")


def test_nothing_shows_the_help_and_is_no_success() -> None:
    result = CliRunner().invoke(app, [], prog_name="qaic-ray")
    assert result.exit_code == 2
    assert result.output.startswith("Usage: qaic-ray [OPTIONS] COMMAND ...")


def test_help_of_what_is_no_command_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"There is no command 'rnu'; did you mean run\?"):
        CliRunner().invoke(app, ["help", "rnu"], catch_exceptions=False)


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["version"]])
def test_the_version_is_said(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert re.fullmatch(r"qaic-ray \d+\.\d+\S*\n", result.output)
