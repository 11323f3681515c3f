"""Bad input: one sentence on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qaic_ray.cli import main
from qaic_ray.cli.screen import Screen
from qaic_ray.errors import UsageError
from qaic_ray.export.check.replay import Activation
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.pipeline import run_step
from qaic_ray.pipeline.run_step import RunRequest
from qaic_ray.rows import FinishReason, Prompt, Row, Sample
from qaic_ray.sampling_params import SamplingParams

Run = Callable[..., tuple[int, str, str]]

# A compiler that must never be reached, and two Standard cards.
DEVICES = "".join(
    f"QID {qid}\n\tStatus:Ready\n\tDram Total:16308 MB\n\tDram Free:16308 MB\n"
    "\tNsp Total:14\n\tNsp Free:14\n\tSku Type:PCIe\n"
    for qid in range(2)
)


@pytest.fixture
def sdk(tmp_path: Path) -> Path:
    root = tmp_path / "sdk"
    for folder in ("exec", "tools", "versions"):
        (root / folder).mkdir(parents=True)
    (root / "exec" / "qaic-exec").write_text("#!/bin/sh\ntouch compiled; exit 1\n")
    (root / "exec" / "qaic-exec").chmod(0o755)
    (root / "tools" / "qaic-util").write_text(f"#!/bin/sh\ncat <<'END'\n{DEVICES}END\n")
    (root / "tools" / "qaic-util").chmod(0o755)
    (root / "versions" / "apps.xml").write_text(
        "<versions><ci_build><base_version>1.20</base_version></ci_build></versions>"
    )
    return root


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `qaic-ray` in an empty folder; exit code, stdout, stderr."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("QAIC_RAY_SDK", raising=False)

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


@pytest.fixture
def model_dir(make_model_dir: Callable[..., Path]) -> Path:
    return make_model_dir()


def assert_refused(result: tuple[int, str, str], words: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    sentence = err.splitlines()[-1]
    assert sentence.startswith("qaic-ray: ")
    assert words in sentence
    assert "Traceback" not in err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "--model-name", "no-such-model"], "no-such-model"),
        (["export", "--model-name", "./missing"], "missing"),
        (["launch", "gone.yaml"], "gone.yaml"),
        (["plan", "gone.yaml"], "gone.yaml"),
    ],
)
def test_missing_things_are_named(run: Run, arguments: list[str], words: str) -> None:
    assert_refused(run(*arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mx7", "14"], "fp16, mx6, fp32, not 'mx7'"),
        (["mx6", "0"], "from 1 to 16, not 0"),
        (["mx6", "17"], "from 1 to 16, not 17"),
        (["mx6", "16"], "16 NSPs, and the cards here have 14"),
        (["mx6", "many"], "whole number"),
        (["mx6", "14", "--precision", "fp16"], "given twice"),
        (["mx6", "14", "--prompt-len", "48"], "power of two, not 48"),
        (["mx6", "14", "--prompt-len", "4096"], "4096 does not fit into ctx_len 2048"),
        (["mx6", "14", "--prompt-len", "32+48"], "power of two, not 48"),
        (["--num-speculative-tokens", "3"], "exported without num_logits_to_keep"),
        (["--comp-ctx-lengths", "512,1024"], "exported without compute-context lengths"),
        (["--prefill-rows", "2"], "prefill_rows 2 is for continuous batching"),
        (["mx6", "14", "--batch-size", "0"], "qaic-ray: --batch-size must be at least 1, not 0."),
        (["mx6", "14", "--batch_size=0"], "qaic-ray: --batch_size must be at least 1, not 0."),
        (["mx6", "14", "--ctx-len", "4096"], "4096 is more than the 2048 positions"),
    ],
)
def test_impossible_variants_are_refused(
    run: Run, sdk: Path, model_dir: Path, arguments: list[str], words: str
) -> None:
    assert_refused(run("compile", str(model_dir), *arguments, "--sdk", str(sdk)), words)


PREFILL = {"batch_size": "1", "seq_len": "32", "ctx_len": "128"}
DECODE = {"batch_size": "1", "seq_len": "1", "ctx_len": "128"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([PREFILL, {**DECODE, "batch_size": "2"}], "batch_size must be the same"),
        ([PREFILL, {**DECODE, "ctx_len": "256"}], "ctx_len must be the same"),
        ([{**DECODE, "num_logits_to_keep": "1"}], "exported without num_logits_to_keep"),
        ([{**DECODE, "comp_ctx_lengths": "128"}], "exported without compute-context lengths"),
        ([{**PREFILL, "seq_len": "33"}, DECODE], "power of two, not 33"),
        ([PREFILL, {**DECODE, "seq_len": "2"}], "decode one, with seq_len 1"),
        (
            [{**PREFILL, "full_batch_size": "4"}, {**DECODE, "full_batch_size": "4"}],
            "not exported for continuous batching",
        ),
    ],
)
def test_impossible_specialization_files_are_refused(
    run: Run, sdk: Path, model_dir: Path, tmp_path: Path, entries: Sequence[object], words: str
) -> None:
    path = tmp_path / "specializations.json"
    path.write_text(json.dumps({"specializations": entries}))
    command = ["compile", str(model_dir), "mx6", "14", "--specializations", str(path)]
    assert_refused(run(*command, "--sdk", str(sdk)), words)


def test_shapes_that_the_model_needs_are_asked_for(
    run: Run, sdk: Path, make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model_dir = str(make_model_dir(logits="num_logits_to_keep", comp_ctx_lengths=True))
    command = ["compile", model_dir, "--sdk", str(sdk)]
    assert_refused(run(*command), "say which ones, like --comp-ctx-lengths")
    path = tmp_path / "specializations.json"
    path.write_text(json.dumps({"specializations": [PREFILL, DECODE]}))
    command += ["--specializations", str(path)]
    assert_refused(run(*command), "every specialization must say how many")
    assert_refused(run(*command, "--num-speculative-tokens", "2"), "says all shapes")
    assert_refused(run(*command, "--prefill-rows", "1"), "says all shapes, and --prefill-rows too")


def test_compile_of_a_folder_that_is_no_model_is_refused(
    run: Run, sdk: Path, tmp_path: Path
) -> None:
    assert_refused(run("compile", str(tmp_path / "gone"), "--sdk", str(sdk)), "gone")
    (tmp_path / "empty").mkdir()
    assert_refused(run("compile", str(tmp_path / "empty"), "--sdk", str(sdk)), "empty")


@pytest.fixture
def qpc(tmp_path: Path) -> Path:
    folder = tmp_path / "qpc"
    folder.mkdir()
    header = struct.pack("<4sBBHQQ", bytes.fromhex("7ccda100"), 0, 1, 1, 24, 0)
    (folder / "programqpc.bin").write_bytes(header)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device-id", "0,1,2"], "no device 2: the cards here are 0, 1"),
        (["--device-id", "0,0"], "device 0 is given twice"),
        (["--device-id", "first"], "whole number"),
        (["--prompts-file", "gone.txt"], "gone.txt"),
        (["-i", "gone/*.jsonl"], "No file matches gone/*.jsonl: give a pattern"),
        (["-i", "-", "-i", "gone.txt"], "can be read only once"),
        (["-i", "s4://b/x"], "s4://b/x cannot be reached"),
        (["-i", "s3://a:secret@b/x"], "give s3://b/x, and the credentials by the environment"),
        (["-i", __file__, "--shard", "0/2"], "--shard: must be K/N with K from 1 to N"),
        (["-i", __file__, "--shard", "3/2"], "--shard: must be K/N with K from 1 to N"),
        (["-i", __file__, "--sample", "0%"], "--sample: must be a number of rows, or a share"),
        (["-i", __file__, "--limit", "0"], "--limit must be at least 1, not 0."),
        (["--shard", "1/2"], "--shard and --sample are of files"),
        (["--output-parts", f"{__file__}/parts"], "cannot be made a folder"),
        (["--temperature", "-1"], "temperature is -1.0; allowed is a number from 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top_p", "2"], "top_p is 2.0; allowed is"),
        (["--stop", ""], "stop is ('',); allowed is"),
        (["--stop-token-ids", "1,x"], "--stop-token-ids takes a whole number"),
        (["--top_k", "1.5"], "--top_k takes a whole number, not '1.5'."),
        (["--temperature", "hot"], "--temperature takes a number, not 'hot'."),
        (["--seed", "-1"], "seed is -1; allowed is"),
        (["--logprobs", "99"], "logprobs is 99; allowed is"),
        (["--n", "2"], "set a temperature"),
        (["--min-tokens", "5", "--generation-len", "4"], "at most max_tokens, which is 4"),
        (["--system", "Be brief."], "give --chat"),
        (["--chat-template-kwargs", "{x"], "--chat-template-kwargs is not JSON"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs must hold a JSON object"),
        (["--chat-template-kwargs", '{"tokenize": true}'], "'tokenize'"),
        (["--chat-template", "gone.jinja"], "gone.jinja"),
    ],
)
def test_impossible_runs_are_refused(
    run: Run, sdk: Path, qpc: Path, arguments: list[str], words: str
) -> None:
    base = ["run", "--model-name", "smollm2-135m", "--qpc", str(qpc), "--sdk", str(sdk)]
    prompt = [] if {"--prompts-file", "-i"} & set(arguments) else ["--prompt", "Hello"]
    assert_refused(run(*base, *prompt, *arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device-id", "9"], "no device 9: the cards here are 0, 1"),
        (["--shard", "1/2"], "--shard and --sample are of files"),
        (["--sample", "5%"], "--shard and --sample are of files"),
        (["--output-parts", "ftp://x/y"], "ftp://x/y cannot be reached"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_made(
    run: Run, sdk: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    made: list[object] = []
    monkeypatch.setattr(
        "qaic_ray.pipeline.prepare_step.prepare_for", lambda *a, **k: made.append(a)
    )
    command = ["run", "smollm2-135m", "Hello", "--sdk", str(sdk), *arguments]
    assert_refused(run(*command), words)
    assert made == []


def test_run_options_are_the_sampling_fields_of_that_name(
    run: Run, sdk: Path, qpc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RunRequest] = []

    def take(request: RunRequest, *_: object) -> None:
        asked.append(request)
        raise UsageError("This is as far as it goes.")

    monkeypatch.setattr(run_step, "run_step", take)
    base = ["run", "--model-name", "m", "--qpc", str(qpc), "--sdk", str(sdk), "--prompt", "a"]
    numbers = {"top_k": 4, "top_p": 0.5, "min_p": 0.1, "seed": 0, "n": 2, "logprobs": 0}
    numbers |= {"temperature": 0.7, "repetition_penalty": 1.1, "min_tokens": 1}
    numbers |= {"presence_penalty": -1.0, "frequency_penalty": 0.0}
    stops = ["--stop", "a", "--stop", "b\n", "--stop_token_ids", "3, 5", "--ignore-eos"]
    words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    assert_refused(run(*base, *stops, *words, "--run-seed", "9"), "as far")
    assert_refused(run(*base), "as far")
    assert_refused(run(*base), "as far")
    fields = numbers | {"stop": ["a", "b\n"], "stop_token_ids": [3, 5], "ignore_eos": True}
    assert asked[0].run.sampling == SamplingParams().updated(fields)
    assert asked[0].run.seed == 9
    assert asked[1].run.sampling == SamplingParams()
    assert asked[1].run.seed != asked[2].run.seed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--opset", "12"], "--opset takes 13 or 17, not 12."),
        (["--io", "recipe"], "--io takes position-ids or cache-index, not 'recipe'."),
        (["--replicate-kv-heads", "0"], "--replicate-kv-heads must be at least 1, not 0"),
        (["--io", "cache-index", "--continuous-batching"], "no continuous batching with it"),
        (["--comp-ctx-lengths", "--opset", "13"], "comp_ctx_lengths needs opset 17"),
        (["--output", "a" * 5000], "--output: it is 'aaa"),
    ],
)
def test_options_of_an_export_are_checked_before_its_model(
    run: Run, arguments: list[str], words: str
) -> None:
    assert_refused(run("export", "--model-name", "no-such-model", *arguments), words)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--top_k", "3"], "--top-k"),
        (["-o", "o"], "--output"),
        (["--generation_len", "5"], "--max-tokens"),
        (["--no-add-generation-prompt"], "--no-add-generation-prompt"),
        (["--output", "o"], "--output"),
        (["--qpc", "q"], "--qpc"),
        (["smollm2-135m"], "MODEL"),
        (["smollm2-135m", "My name is", "--n", "1"], "MODEL"),
    ],
)
def test_what_changes_answers_may_not_be_said_anew(
    run: Run, tmp_path: Path, option: list[str], named: str
) -> None:
    begun = str(tmp_path / "begun")
    refused = run("run", "--resume", begun, *option)
    assert_refused(refused, f"{named} cannot be changed in the middle of a run: leave it out")
    free = "--input, --device-id, --sdk, --metrics, --address, --dashboard, --keep-ray"
    free += ", --retry-errors, --stop-if-errors, --stream, --no-stream, --json"
    free += ", --verbose, --log-format"
    assert_refused(refused, f"only {free} may stand beside --resume")
    allowed = ["--prompts-file", "p", "--device-id", "0", "--json", "--no-stream", "--retry-errors"]
    assert_refused(run("run", "--resume", begun, *allowed), "is not the folder of a run")


def test_run_needs_prompts_once(run: Run, sdk: Path, qpc: Path) -> None:
    base = ["run", "--model-name", "m", "--qpc", str(qpc), "--sdk", str(sdk)]
    assert_refused(run(*base), "--prompt")
    assert_refused(run(*base, "--prompt", "a", "--prompts-file", "b.txt"), "one of")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "Give a model and a prompt, like `qaic-ray run smollm2-135m"),
        (["run", "m"], "There is nothing to answer"),
        (["run", "m", "a", "--prompt", "b"], "The prompt is given twice"),
        (["run", "m", "a", "--prompts-file", "b"], "not both"),
        (["run", "m", "a", "--model-name", "n"], "model-name is given twice, as 'm' and as 'n'"),
        (["run", "m", "a", "--system", "Be brief."], "give --chat"),
        (["run", "m", "a", "--qpc", "q", "--precision", "fp16"], "--precision is of a program"),
        (["run", "m", "a", "--group-size", "2"], "give it by --qpc"),
        (["run", "m", "a", "--input-len", "100"], "power of two, not 100"),
        (["run", "./missing", "a"], "missing"),
        (["run", "./missing", "--prompts-file", "gone.txt"], "missing"),
    ],
)
def test_run_says_what_it_lacks_before_it_makes_anything(
    run: Run, sdk: Path, arguments: list[str], words: str
) -> None:
    assert_refused(run(*arguments, "--sdk", str(sdk)), words)
    assert not list(sdk.parent.glob("cache/programs/*"))


def test_run_needs_a_qpc(run: Run, sdk: Path, tmp_path: Path) -> None:
    base = ["run", "--model-name", "m", "--prompt", "a", "--sdk", str(sdk)]
    assert_refused(run(*base, "--qpc", str(tmp_path / "gone")), "programqpc.bin")


def test_unknown_job_key_is_refused_with_the_near_one(run: Run, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: x\nmodel: {name: smollm2-135m}\ncompile: {precison: mx6}\n")
    assert_refused(run("launch", str(job)), "did you mean 'precision'")


def test_dl2q_job_plans_its_argv_and_says_that_the_sdk_is_missing(run: Run) -> None:
    assert_refused(run("launch", "dl2q-llama-7b"), "There is no Cloud AI SDK at /opt/qti-aic")
    assert "128pl-2048cl-14c-8BS-mx6" in run("plan", "dl2q-llama-7b")[1]
    code, out, _ = run("plan", "dl2q-llama-7b-recipe")
    assert code == 0
    for flag in ("/opt/qti-aic/exec/", "-aic-num-cores=14", "-mxfp6-matmul", "-retained-state"):
        assert flag in out
    assert "256pl-2048cl-14c-1BS-mx6" in out


def test_plan_names_all_shapes_of_a_variant(run: Run, tmp_path: Path) -> None:
    job = tmp_path / "spec.yaml"
    job.write_text(
        "name: spec\nmodel: {name: m}\nexport: {logits: num_logits_to_keep, "
        "comp_ctx_lengths: true}\ncompile: {prompt_len: [32+128, 64], num_speculative_tokens: 4}\n"
        "run: {variant: {prompt_len: 32+128}}\n"
    )
    assert_refused(run("plan", str(job)), "say which ones with compile.comp_ctx_lengths")
    code, out, _ = run("plan", str(job), "--set", "compile.comp_ctx_lengths=[512]")
    assert code == 0
    assert "m-kv-32+128pl-512+2048cl-14c-1BS-4spec-mx6 (this one is run)" in out
    assert "m-kv-64pl-512+2048cl-14c-1BS-4spec-mx6\n" in out


def test_rows_of_a_prefill_are_in_the_name_of_a_planned_variant(run: Run, tmp_path: Path) -> None:
    job = tmp_path / "rows.yaml"
    job.write_text("name: r\nmodel: {name: m}\ncompile: {batch_size: 8, prefill_rows: 4}\n")
    code, out, _ = run("plan", str(job))
    assert code == 0
    assert "m-kv-256pl-2048cl-14c-8BS-4rows-mx6" in out


def test_devices_are_listed(run: Run, sdk: Path) -> None:
    code, out, _ = run("devices", "--sdk", str(sdk), "--json")
    assert code == 0
    cards = json.loads(out)["devices"]
    assert [(card["qid"], card["nsp_total"]) for card in cards] == [(0, 14), (1, 14)]


def test_socs_of_a_board_are_grouped(run: Run, sdk: Path) -> None:
    lines = "".join(
        f"QID {qid}\n\tStatus:Ready\n\tNsp Total:16\n\tNsp Free:16\n"
        f"\tSku Type:Pcie Ultra\n\tBoard serial:B{qid // 4}\n"
        for qid in range(8)
    )
    (sdk / "tools" / "qaic-util").write_text(f"#!/bin/sh\ncat <<'END'\n{lines}END\n")
    code, out, _ = run("devices", "--sdk", str(sdk), "--json")
    assert code == 0
    assert json.loads(out)["boards"] == {"B0": [0, 1, 2, 3], "B1": [4, 5, 6, 7]}
    _, out, _ = run("devices", "--sdk", str(sdk))
    assert "board" in out
    assert out.count("B1") == 4


def test_unknown_option_is_refused_by_name(run: Run) -> None:
    code, _, err = run("devices", "--no-such-option")
    assert code == 2
    assert "--no-such-option" in err


def test_answers_are_printed_whole_and_each_of_several(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = Row(1, "Why?\n" * 40, "[b] so", FinishReason.STOP, id="x")
    screen = Screen(stream=True)
    screen.answered(row)
    samples = tuple(Sample(text, (1,), FinishReason.STOP) for text in ("[i]", "so"))
    screen.answered(replace(row, choices=samples))
    screen.answered(Row.failed(Prompt(2, "p"), "[no]"))
    out = capsys.readouterr().out
    head, text, _, again, *others = out.splitlines()
    assert head == again
    assert head.startswith("1 x Why? Why?")
    assert text == "[b] so"
    assert others == ["1 of 2 [i]", "2 of 2 so", "", "2 p", "[no]", ""]


@pytest.mark.parametrize("next_tokens", [True, False])
def test_an_export_of_token_ids_says_what_a_host_cannot_see(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, next_tokens: bool
) -> None:
    manifest = SimpleNamespace(next_tokens=next_tokens, to_json=lambda: "{}")
    result: Any = SimpleNamespace(
        folder=tmp_path, manifest=manifest, verification=None, reused=False
    )
    Screen(stream=True).exported(result)
    out = " ".join(capsys.readouterr().out.split())
    assert ("a row whose logits overflow is answered wrong without a sign" in out) is next_tokens


@pytest.mark.parametrize(("verbose", "shown"), [(False, 3), (True, 5)])
def test_an_export_names_the_largest_overflows_and_counts_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verbose: bool, shown: int
) -> None:
    beyond = tuple(Activation(None, f"/at/{i}", 1e5 * (1 + i * 2 % 5)) for i in range(5))
    report = SimpleNamespace(level="full", layers=1, tolerance=1e-3, scenarios=(), overflows=beyond)
    manifest = SimpleNamespace(next_tokens=False, to_json=lambda: "{}")
    result: Any = SimpleNamespace(
        folder=tmp_path, manifest=manifest, verification=report, reused=False
    )
    Screen(verbose=verbose).exported(result)
    out = capsys.readouterr().out
    named = [a for a in beyond if f"{a.name} reaches {a.largest:.3g}: beyond float16" in out]
    assert len(named) == shown
    assert min(a.largest for a in named) >= max(
        (a.largest for a in beyond if a not in named), default=0
    )
    assert ("and 2 more, none of them larger" in out) is (not verbose)
