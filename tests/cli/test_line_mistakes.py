"""A wrong command line is one sentence, with what was meant and where it says; exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_lines import all_names, is_group, of_name

from qaic_ray.cli import main
from qaic_ray.files.folders import CACHE_VARIABLE


def said(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["qaic-ray", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("rnu", "There is no command 'rnu'; did you mean run? `qaic-ray -h` lists them."),
        ("list", "There is no command 'list'; did you mean runs? `qaic-ray -h` lists them."),
        ("frobnicate", "There is no command 'frobnicate'. `qaic-ray -h` lists them."),
        ("ray shwo", "There is no command 'shwo' of ray; did you mean show? `qaic-ray ray -h`"),
        (
            "run --max-tokns 3",
            "run has no option --max-tokns; did you mean --max-tokens? `qaic-ray",
        ),
        ("run --max_tokns=3", "did you mean --max-tokens? `qaic-ray run -h` says more."),
        ("run --modelname x", "run has no option --modelname; did you mean --model? `qaic-ray run"),
        ("run --no-metrcs", "did you mean --no-metrics?"),
        ("run --tex x", "run has no option --tex. `qaic-ray run -h` says more."),
        ("run --systm x", "run has no option --systm; did you mean --system?"),
        ("serve --nope", "serve has no option --nope. `qaic-ray serve -h` says more."),
        ("runs --xyz", "runs has no option --xyz. `qaic-ray runs -h` says more."),
        ("run -x", "run has no option -x. `qaic-ray run -h` says more."),
        ("--frob x", "qaic-ray has no option --frob. `qaic-ray -h` says more."),
        ("--qpc x run", "qaic-ray has no option --qpc; it stands behind a command: `qaic-ray run"),
        ("run m x --debug", "has no option --debug; it stands before the command: `qaic-ray --deb"),
        ("--debug", "qaic-ray needs a command. `qaic-ray -h` says more."),
        ("run --qpc", "--qpc needs a value behind it. `qaic-ray run -h` says more."),
        ("run --json=yes", "--json takes no value. `qaic-ray run -h` says more."),
        ("show x", "show needs ROW (the row's index, from 0, or its id). `qaic-ray show -h`"),
        ("export", "MODEL or --model is needed: local folder, hub id, .gguf file, or smollm2"),
        ("export a -m b", "model is given twice, as 'a' and as 'b': give it once."),
        ("plan a b", "plan takes JOB, and has no place for 'b'. `qaic-ray plan -h` says more."),
        ("devices 0", "devices takes options only, and has no place for '0'. `qaic-ray devices"),
        (
            "run m The capital (of)",
            "run takes MODEL and PROMPT, and has no place for 'capital (of)' (a text of several "
            "words stands between quotes). `qaic-ray run -h` says more.",
        ),
        ("run --n many", "--n takes a whole number, not 'many'."),
        ("run --top_p x", "--top_p takes a number, not 'x'."),
        ("export -m x --opset 12", "--opset takes 13 or 17, not 12."),
        ("compile m mx6 --precision fp16", "precision is given twice, as 'mx6' and as 'fp16'"),
    ],
)
def test_a_mistake_is_one_sentence(
    line: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    found = said(line.split(), monkeypatch, capsys)
    assert found.startswith("qaic-ray: ")
    assert sentence in found
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", [name for name in all_names() if not is_group(of_name(name))])
def test_every_command_refuses_an_option_that_it_has_not(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "emulator run":
        return  # all that follows is the program's
    found = said([*name.split(), "--no-such-thing"], monkeypatch, capsys)
    assert found.startswith(f"qaic-ray: {name} has no option --no-such-thing")
    assert found.endswith(f"`qaic-ray {name} -h` says more.")


def test_a_traceback_is_shown_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qaic-ray", "--debug", "run", "--nothing"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("qaic-ray: run has no option --nothing")
