"""The command lines of the published recipe's scripts, as typed: taken, or refused with the new
form. No Ray."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from qaic_ray.cli import main
from qaic_ray.cli.commands import app
from qaic_ray.cli.flags.recipe import translated
from qaic_ray.compile import store
from qaic_ray.compile.store import Build, BuildRequest
from qaic_ray.errors import UsageError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.pipeline import compile_step, run_step
from qaic_ray.pipeline.run_step import RunRequest
from qaic_ray.rows import Prompt, Row

HASH = "e691febcfceb864f235225f4e6dcae07e2be6332"
SNAPSHOT = f"./models--LLM360--Amber/snapshots/{HASH}"

# What each script takes, in any of its public versions.
GENERATE = ["--model-name", "--model-class", "--model-type", "--model-path"]
GENERATE_GONE = ["--input-str", "--seq-len", "--use-auth-token", "--run-on-aic"]
RUN = ["--model-name", "--qpc", "--prompt", "--input-len", "--no-stream", "--device_id"]
RUN_GONE = ["--enable-debug-logs", "--write-io-dir", "--automation"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `qaic-ray` in an empty folder; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("QAIC_RAY_SDK", "emulated")

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qaic-ray", *arguments])
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        else:
            code = 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def options_of(command: str) -> set[str]:
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    with found.make_context(command, [], resilient_parsing=True) as context:
        return {word for parameter in found.get_params(context) for word in parameter.opts}


@pytest.mark.parametrize(("command", "flags"), [("export", GENERATE), ("run", RUN)])
def test_every_flag_that_is_kept_is_a_flag(command: str, flags: list[str]) -> None:
    known = options_of(command)
    for flag in flags:
        assert translated(command, [flag])[0].replace("_", "-") in known
        typed = flag.replace("-", "_").replace("__", "--")
        assert translated(command, [typed])[0].replace("_", "-") in known


@pytest.mark.parametrize(
    ("command", "flag"),
    [*(("export", flag) for flag in GENERATE_GONE), *(("run", flag) for flag in RUN_GONE)],
)
@pytest.mark.parametrize("value", [[], ["x"], "=x"])
def test_every_other_flag_is_refused_with_what_to_do(
    run: Run, tmp_path: Path, command: str, flag: str, value: list[str] | str
) -> None:
    words = [f"{flag}{value}"] if isinstance(value, str) else [flag, *value]
    for typed in (words, [words[0].replace("-", "_").replace("__", "--", 1), *words[1:]]):
        code, out, err = run(command, "--model-name", SNAPSHOT, *typed)
        assert (code, out) == (2, "")
        assert err.startswith(f"qaic-ray: {typed[0].partition('=')[0]} of ")
        assert "leave it out; " in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_flags_of_the_scripts_are_ours_by_meaning() -> None:
    assert translated("export", ["--model_type", "LlamaForCausalLM", "--model-path=a-kv"]) == [
        *("--model-class", "LlamaForCausalLM", "--output=a-kv")
    ]
    assert translated("compile", ["a-kv", "--seq-len", "32", "--context-len=64"]) == [
        *("a-kv", "--prompt-len", "32", "--ctx-len=64")
    ]
    assert translated("run", ["--prompt-len", "256", "--prompt", "--seq-len"])[:2] == [
        *("--input-len", "256")
    ]
    for command in ("launch", "doctor", "compile"):
        assert translated(command, ["--input-str", "--", "--seq-len"]) == [
            *("--input-str", "--", "--seq-len")
        ]


def test_a_prompt_without_quotes_is_said_to_need_them(run: Run, tmp_path: Path) -> None:
    """`--prompt <Enter prompt>`, says the recipe's text."""
    words = ["run", "--model-name", SNAPSHOT, "--qpc", "q"]
    code, _, err = run(*words, "--prompt", "My", "name", "is", "--device_id", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert 'between double quotes: --prompt "My name is".' in err
    assert translated("run", ["--prompt", "a|b", "smollm2-135m"]) == [
        *("--prompt", "a|b", "smollm2-135m")
    ]


@pytest.mark.parametrize(
    ("script", "command"),
    [("generateONNX.py", "export"), ("compileModel.sh", "compile"), ("runModel.py", "run")],
)
def test_a_script_s_name_leads_to_its_command(run: Run, script: str, command: str) -> None:
    code, _, err = run(script, "--model-name", SNAPSHOT)
    assert code == 2
    assert f"did you mean {command}?" in err


def test_the_exported_folder_is_not_taken_for_the_model(
    run: Run, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_dir()
    code, _, err = run("export", "--model-name", str(folder))
    assert code == 2
    assert "holds an exported model (custom_io.yaml)" in err
    assert "give the checkpoint that it was made of" in err


def test_the_form_for_several_socs_is_refused_with_its_names(run: Run) -> None:
    numbers = ("1", "256", "1024", "16", "16", "1")
    code, _, err = run("compile", "Amber-kv", *numbers, "4", "-mxfp6-matmul")
    assert code == 2
    new = "`qaic-ray compile Amber-kv mx6 16 --batch-size 1 --prompt-len 256 --ctx-len 1024`"
    assert new in err
    assert "run with --group-size 4" in err
    code, _, err = run("compile", "Amber-kv", *numbers, "1")
    assert "compile Amber-kv fp16 16 " in err
    assert "--group-size" not in err


PROGRAM = struct.pack("<4sBBHQQ", bytes.fromhex("7ccda100"), 0, 1, 1, 24, 0)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The compiler's command lines; each is answered with a program."""
    asked: list[list[str]] = []

    def compiler(argv: list[str], log: Path, **_: object) -> None:
        asked.append(argv)
        log.write_text("done")
        (folder,) = (word.partition("=")[2] for word in argv if "-aic-binary-dir=" in word)
        Path(folder).mkdir()
        (Path(folder) / "programqpc.bin").write_bytes(PROGRAM)

    monkeypatch.setattr(store, "run_compiler", compiler)
    return asked


def test_edited_shapes_positions_and_names_of_compile_model_sh(
    run: Run, make_model_dir: Callable[..., Path], tmp_path: Path, compiles: list[list[str]]
) -> None:
    make_model_dir(f"{HASH}-kv")
    entries = [{"batch_size": "1", "prompt_length": "256", "context_len": "2048"}]
    entries += [{"batch_size": "1", "seq_len": "1", "ctx_len": "2048"}]
    shapes = tmp_path / "specializations.json"
    shapes.write_text(json.dumps({"specializations": entries}))
    short, named = f"{HASH}-kv-256pl-2048cl-14c", f"{HASH}-kv-256pl-2048cl-14c-1BS"

    code, out, err = run("compile", f"{HASH}-kv", "mx6", "14")
    assert (code, out) == (0, f"{tmp_path}/qpc/{named}-mx6\n")
    assert "specializations.json of this folder says the shapes" in err
    assert {"-mxfp6-matmul", "-aic-num-cores=14", "-convert-to-fp16"} <= set(compiles[0])
    written = json.loads((tmp_path / "qpc" / short / "specializations.json").read_text())
    assert [entry.get("symbols", entry) for entry in written["specializations"]] == [
        {"batch_size": "1", "seq_len": "256", "ctx_len": "2048"},
        {"batch_size": "1", "seq_len": "1", "ctx_len": "2048"},
    ]

    code, out, err = run("compile", f"{HASH}-kv", "fp16", "14")
    assert (code, out) == (0, f"{tmp_path}/qpc/{named}-fp16\n")
    assert f"{short} and {named} now lead to {named}-fp16, not to {named}-mx6 any more." in err
    assert os.readlink(tmp_path / "qpc" / short) == f"{named}-fp16"
    code, out, err = run("compile", f"{HASH}-kv", "mx6", "14")  # kept, and the newest again
    assert (code, len(compiles)) == (0, 2)
    assert os.readlink(tmp_path / "qpc" / short) == f"{named}-mx6"


def test_several_variants_at_once_take_no_name_of_the_recipe(
    run: Run, make_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script made one; of several nobody could say which has the name."""
    made = []

    def compiled(requests: list[BuildRequest], *_: object) -> list[object]:
        made.extend(requests)
        return [(each.variant, Build(each.target, "", False, 0.0, 0)) for each in requests]

    monkeypatch.setattr(compile_step, "compile_step", compiled)
    make_model_dir()
    assert run("compile", "m-kv", "mx6,fp16", "14")[0] == 0
    assert len(made) == 2
    assert not (tmp_path / "qpc").exists()


def test_run_takes_the_recipe_s_name_and_says_what_it_leads_to(
    run: Run,
    make_model_dir: Callable[..., Path],
    tmp_path: Path,
    compiles: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_model_dir(f"{HASH}-kv")
    assert run("compile", f"{HASH}-kv", "mx6", "14")[0] == 0
    asked: list[RunRequest] = []

    def take(request: RunRequest, *_: object) -> None:
        asked.append(request)
        raise UsageError("This is as far as it goes.")

    monkeypatch.setattr(run_step, "on_local_cards", take)
    qpc = f"qpc/{HASH}-kv-256pl-2048cl-14c"
    words = ["--input-len", "256", "--device_id", "2", "--prompt", "My name is|I live in"]
    code, _, err = run("run", "--model-name", SNAPSHOT, "--qpc", qpc, *words)
    assert code == 2
    assert f"{qpc} leads to {HASH}-kv-256pl-2048cl-14c-1BS-mx6\n" in err
    (request,) = asked
    assert request.qpc == Path(f"{qpc}-1BS-mx6")
    assert (request.run.input_len, request.run.devices) == (256, (2,))
    assert request.model == SNAPSHOT
    prompts = [item.prompt if isinstance(item, Row) else item.text for item in rows_of(request)]
    assert prompts == ["My name is", "I live in"]

    for flag, number, words in (("--input-len", "128", "256"), ("--ctx-len", "256", "2048")):
        shapes = [flag, number, "--prompt", "a"]
        code, _, err = run("run", "--model-name", SNAPSHOT, "--qpc", qpc, *shapes)
        assert code == 2
        assert f"{flag} is {number}, but {qpc}-1BS-mx6 was compiled for {words}" in err
    assert len(asked) == 1
    # The recipe's placeholder for the path is `<qpc/model-name-...>`: some leave the folder out.
    code, _, err = run("run", "--model-name", SNAPSHOT, "--qpc", qpc[4:], "--prompt", "a")
    assert (code, len(asked)) == (2, 1)
    assert f"give the folder of a compiled variant, like {qpc}." in err


def rows_of(request: RunRequest) -> list[Prompt | Row]:
    return list(request.open_input().prompts)


def test_no_stream_says_where_the_answers_are(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(*_: object) -> None:
        raise UsageError("This is as far as it goes.")

    monkeypatch.setattr(run_step, "run_step", take)
    words = ["run", "--model-name", "m", "--qpc", "q", "--prompt", "a"]
    remark = "--stream ordered prints each when it is whole, as the recipe's --no-stream did."
    assert remark in run(*words, "--no-stream")[2]
    assert remark not in run(*words, "--no-stream", "--json")[2]
    assert remark not in run(*words)[2]
