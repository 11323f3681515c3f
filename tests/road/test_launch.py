"""The whole road as a user takes it: the command, its files, its exit code. Real Ray and actors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

pytestmark = pytest.mark.cluster

# What must survive unchanged on the way to the outputs; the last two cannot be answered.
TEXTS = [
    "plain",
    "  leading and trailing  ",
    "quotes \" and ' and \\ backslash",
    "new\nline",
    "日本語 – naïve – 🙂",
    "a | b",
    "",
    "x" * 300,
]


def qaic_ray(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from qaic_ray.cli import main; main()", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "QAIC_RAY_SDK": "emulated"},
    )


def rows_of(run_folder: Path, name: str = "outputs.jsonl") -> list[dict[str, Any]]:
    lines = (run_folder / name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.fixture(scope="module")
def launched(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One launched job in a folder of its own."""
    work = tmp_path_factory.mktemp("road")
    (work / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": f"p{i}", "prompt": t}) + "\n" for i, t in enumerate(TEXTS)),
        encoding="utf-8",
    )
    job = {
        "name": "tiny",
        "model": {"name": str(tiny_checkpoint)},
        "export": {"verify": "off"},
        "compile": {
            "precision": ["fp16", "mx6", "fp32"],
            "num_cores": 14,
            "batch_size": 2,
            "prompt_len": 16,
            "ctx_len": 128,
        },
        "run": {
            "variant": {"precision": "fp32"},
            "devices": [0, 2],
            "prompts": "prompts.jsonl",
            "generation_len": 6,
        },
    }
    (work / "tiny.yaml").write_text(yaml.safe_dump(job))
    return work, qaic_ray("launch", "tiny.yaml", "--json", cwd=work)


def test_launch_ends_with_its_figures_and_says_that_rows_failed(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    work, result = launched
    assert result.returncode == 1, result.stderr  # two rows cannot be answered
    report = json.loads(result.stdout)
    assert (report["rows"], report["failed_rows"]) == (len(TEXTS), 2)
    assert report["sdk"].startswith("emulated SDK")
    run_folder = Path(report["folder"])
    assert run_folder.parent == work / "runs"
    assert {p.name for p in run_folder.iterdir()} >= {
        "job.yaml", "outputs.jsonl", "errors.jsonl", "events.jsonl", "report.json", "report.html"
    }  # fmt: skip
    rows = rows_of(run_folder)
    assert report["generated_tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert report["tokens_per_s"] == pytest.approx(
        report["generated_tokens"] / report["seconds"], rel=0.01
    )
    assert {worker["name"] for worker in report["workers"]} == {"card 0", "card 2"}
    assert "Traceback" not in result.stderr


def test_a_runs_report_is_whole_and_drawn_anew_from_its_folder(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    work, _ = launched
    (run_folder,) = (work / "runs").iterdir()
    document = json.loads((run_folder / "report.json").read_text())
    rows = [row for row in rows_of(run_folder) if row["finish_reason"] != "error"]
    assert document["missing"] == []
    assert document["state"] == "done"
    assert document["latency"]["end_to_end"]["count"] == len(rows)
    gaps = sum(len(row["token_ids"]) - 1 for row in rows)
    assert document["latency"]["inter_token"]["count"] == gaps
    tokens = sum(sum(lane["tokens"]) for lane in document["timeline"]["workers"])
    assert tokens == pytest.approx(document["generated_tokens"], rel=0.01)
    for row in rows:
        assert 0 <= row["queue_s"] <= row["ended_at"] - row["started_at"] + 0.001
    assert {build["name"] for build in document["compiles"]} >= {document["qpc"]}
    assert document["ran"]["command"].startswith("qaic-ray launch")
    again = qaic_ray("report", str(run_folder), "--json", cwd=work)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == document
    drawn = qaic_ray("report", str(run_folder), cwd=work).stdout
    assert "card 0" in drawn
    assert "not a card's speed" in drawn
    assert drawn.splitlines()[-1].split() == ["report", str(run_folder / "report.html")]
    page = qaic_ray("report", run_folder.name, str(run_folder), "--html", "both.html", cwd=work)
    assert page.returncode == 0, page.stderr
    assert (work / "both.html").exists()


def test_rows_are_in_input_order_with_their_text_unchanged(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    work, _ = launched
    (run_folder,) = (work / "runs").iterdir()
    rows = rows_of(run_folder)
    assert [row["index"] for row in rows] == list(range(len(TEXTS)))
    assert [row["prompt"] for row in rows] == TEXTS
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(len(TEXTS))]
    assert {row["worker"] for row in rows if row["token_ids"]} <= {"card 0", "card 2"}
    errors = rows_of(run_folder, "errors.jsonl")
    assert [row["index"] for row in errors] == [6, 7]
    assert "empty" in errors[0]["error"]
    assert "300 tokens, more than the context of 128" in errors[1]["error"]


def test_every_variant_is_compiled_and_answers_are_transformers_own(
    launched: tuple[Path, subprocess.CompletedProcess[str]], tiny_checkpoint: Path
) -> None:
    work, _ = launched
    assert sorted(p.name for p in (work / "qpc").iterdir()) == [
        f"tiny-kv-16pl-128cl-14c-2BS-{precision}" for precision in ("fp16", "fp32", "mx6")
    ]
    torch = pytest.importorskip("torch")
    from qaic_ray.model.checkpoint import load_tokenizer, load_torch_model, open_checkpoint

    checkpoint = open_checkpoint(str(tiny_checkpoint))
    model, tokenizer = load_torch_model(checkpoint), load_tokenizer(checkpoint)
    (run_folder,) = (work / "runs").iterdir()
    for row in rows_of(run_folder):
        if row["finish_reason"] == "error":
            continue
        ids = torch.tensor([tokenizer.encode(row["prompt"])])
        with torch.inference_mode():
            output = model.generate(
                ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids)
            )
        assert row["token_ids"] == output[0, ids.shape[1] :].tolist()


def test_the_three_steps_by_hand_and_what_a_qpc_is_not(
    launched: tuple[Path, subprocess.CompletedProcess[str]], tiny_checkpoint: Path, address: str
) -> None:
    work, _ = launched
    exported = qaic_ray("export", "--model_name", str(tiny_checkpoint), "--verify", "off", cwd=work)
    assert exported.returncode == 0, exported.stderr
    variant = ("tiny-kv", "mx6", "14", "--prompt-len", "16", "--ctx-len", "64")
    compiled = qaic_ray("compile", *variant, "--json", cwd=work)
    assert compiled.returncode == 0, compiled.stderr
    (built,) = json.loads(compiled.stdout)["variants"]
    assert Path(built["path"]) == work / "qpc" / "tiny-kv-16pl-64cl-14c-1BS-mx6"
    run = ["run", "--model_name", str(tiny_checkpoint), "--qpc", built["path"]]
    run += ["--address", address]
    asked = [*run, "--device_id", "0,1,2,3", "--prompt", r"My name is|The capital \| of", "--json"]
    answered = qaic_ray(*asked, "--generation-len", "5", "--input-len", "16", cwd=work)
    assert answered.returncode == 0, answered.stderr
    report = json.loads(answered.stdout)
    rows = rows_of(Path(report["folder"]))
    assert [row["prompt"] for row in rows] == ["My name is", "The capital | of"]
    runs = sorted((work / "runs").iterdir())
    wrong = qaic_ray(*run, "--prompt", "a", "--input-len", "32", cwd=work)
    assert wrong.returncode == 2
    assert "--input-len is 32" in wrong.stderr
    assert "compiled for 16" in wrong.stderr
    unable = qaic_ray(*run, "--prompt", "a", "--chat", cwd=work)
    assert unable.returncode == 2
    assert "no chat template" in unable.stderr
    assert sorted((work / "runs").iterdir()) == runs  # nothing half-written


def test_speculative_decoding_gives_the_same_text_in_fewer_steps(
    launched: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, address: str
) -> None:
    work, _ = launched
    job = yaml.safe_load((work / "tiny.yaml").read_text())
    job["export"]["logits"] = "num_logits_to_keep"
    job["compile"] |= {"precision": "fp32", "num_speculative_tokens": 3}
    job["run"] |= {"variant": {}, "generation_len": 24, "devices": 1}
    form = {"prompt": "a form", "guided_regex": "forced [a-c]{3} forced", "seed": 5}
    form["temperature"] = 1.0
    prompts = (work / "prompts.jsonl").read_text() + json.dumps(form) + "\n"
    (tmp_path / "prompts.jsonl").write_text(prompts)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(job))
    found = {}
    for drafts in ("none", "prompt-lookup"):
        launch = ("launch", "tiny.yaml", "--set", f"run.drafts={drafts}", "--address", address)
        result = qaic_ray(*launch, "--json", cwd=tmp_path)
        assert result.returncode == 1, result.stderr  # some of the prompts cannot be answered
        report = json.loads(result.stdout)
        found[drafts] = (report, rows_of(Path(report["folder"])))
    (plain, plain_rows), (lookup, lookup_rows) = found["none"], found["prompt-lookup"]
    assert [row["token_ids"] for row in lookup_rows] == [row["token_ids"] for row in plain_rows]
    assert re.fullmatch("forced [a-c]{3} forced", lookup_rows[-1]["text"])
    assert plain["acceptance"] is None
    assert 0 < lookup["accepted_tokens"] <= lookup["drafted_tokens"]
    assert lookup["tokens_per_row_step"] > plain["tokens_per_row_step"] == 1.0


def test_answers_have_the_form_that_is_asked_for_and_prompts_their_logprobs(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
    tiny_checkpoint: Path,
    tmp_path: Path,
    address: str,
) -> None:
    work, _ = launched
    job = yaml.safe_load((work / "tiny.yaml").read_text())
    job["export"]["logits"] = "all"
    job["compile"] |= {"precision": "fp32"}
    job["run"] |= {"variant": {}, "generation_len": 40, "devices": 1}
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    text = "A prompt of several chunks: 日本語"
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "structured_outputs": {"choice": ["left", "right"]}},
        {"prompt": "b", "response_format": wanted, "logit_bias": {"125": 50}},
        {"prompt": text, "prompt_logprobs": 3, "max_tokens": 1},
        {"prompt": text, "prompt_logprobs": 0, "n": 2, "temperature": 1.0, "max_tokens": 2},
        {"prompt": "c", "guided_regex": "("},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "prompts.jsonl").write_text(lines)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(job))
    result = qaic_ray("launch", "tiny.yaml", "--json", "--address", address, cwd=tmp_path)
    assert result.returncode == 1, result.stderr  # the last row's regex is none
    choice, of_schema, scored, several, wrong = rows_of(Path(json.loads(result.stdout)["folder"]))
    assert choice["text"] in ("left", "right")
    assert choice["finish_reason"] == "stop"
    if of_schema["finish_reason"] == "stop":
        jsonschema.validate(json.loads(of_schema["text"]), schema)
    assert "structured_outputs.regex cannot be followed: unclosed group." in wrong["error"]
    truth = transformers_logprobs(tiny_checkpoint, text)
    assert scored["prompt_logprobs"][0] is None
    assert len(scored["prompt_logprobs"]) == scored["prompt_tokens"] == len(truth) + 1
    for row in (scored, several):
        for found, logprobs in zip(row["prompt_logprobs"][1:], truth, strict=True):
            assert found["logprob"] == pytest.approx(logprobs[found["token_id"]], abs=1e-3)
            for other in found["top"]:
                assert other["logprob"] == pytest.approx(logprobs[other["token_id"]], abs=1e-3)
    assert [len(found["top"]) for found in scored["prompt_logprobs"][1:]] == [3] * len(truth)


def transformers_logprobs(checkpoint: Path, text: str) -> list[list[float]]:
    """Of every token at each place of a text but the first, by PyTorch's model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
    with torch.inference_mode():
        logprobs: list[list[float]] = model(ids).logits[0, :-1].log_softmax(-1).tolist()
    return logprobs


WISHES: list[dict[str, Any]] = [
    {"prompt": "plain"},
    {"prompt": "plain", "temperature": 0, "max_tokens": 3},
    {"messages": [{"role": "user", "content": "日本語 🙂"}], "temperature": 0, "logprobs": 1},
    {"prompt": "several", "n": 3},
    {"prompt": "plain", "seed": 5},
    {"prompt": "plain", "seed": 5},
    {"prompt": "plain", "temprature": 0},
    {"messages": [{"role": "tool", "content": "x"}]},
]


def test_rows_get_what_they_ask_for_on_any_card_again(
    launched: tuple[Path, subprocess.CompletedProcess[str]], tiny_checkpoint: Path, address: str
) -> None:
    work, _ = launched
    chat = work / "tiny-chat"
    shutil.copytree(tiny_checkpoint, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    (work / "wishes.jsonl").write_text("".join(json.dumps(wish) + "\n" for wish in WISHES))
    asked = ["run", "--model-name", str(chat), "--qpc", "qpc/tiny-kv-16pl-128cl-14c-2BS-fp32"]
    asked += ["--input", "wishes.jsonl", "--max_tokens", "6", "--json"]
    asked += ["--temperature", "0.9", "--chat", "--system", "Be brief.", "--run-seed", "3"]
    runs = []
    for cards in ("1,2,3", "0"):
        result = qaic_ray(*asked, "--stream", "--device-id", cards, "--address", address, cwd=work)
        assert result.returncode == 1, result.stderr  # two rows cannot be answered
        *printed, report = map(json.loads, result.stdout.splitlines())
        assert report["failed_rows"] == 2
        runs.append(rows_of(Path(report["folder"])))
        # Every line is JSON that says what it is; the rows are those of outputs.jsonl.
        assert report["type"] == "report"
        assert printed == [{"type": "row"} | row for row in runs[-1]]
    job = yaml.safe_load((Path(report["folder"]) / "job.yaml").read_text())
    assert (job["seed"], job["system"], job["sampling"]["temperature"]) == (3, "Be brief.", 0.9)
    rows = runs[0]
    answered = [(row["token_ids"], row["text"], row.get("choices")) for row in rows]
    assert answered == [(row["token_ids"], row["text"], row.get("choices")) for row in runs[1]]
    drawn, short, conversation, several, seeded, again, misspelt, refused = rows
    assert len(short["token_ids"]) == 3
    assert "logprobs" not in short
    assert "choices" not in short
    assert drawn["token_ids"] != seeded["token_ids"] == again["token_ids"]
    assert conversation["prompt"] == "日本語 🙂"
    assert conversation["messages"] == WISHES[2]["messages"]
    rendered = "[system]Be brief.[user]日本語 🙂"
    assert conversation["prompt_tokens"] == len(rendered.encode())
    assert [entry["token_id"] for entry in conversation["logprobs"]] == conversation["token_ids"]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert len({tuple(choice["token_ids"]) for choice in several["choices"]}) > 1
    assert 'Unknown sampling field "temprature"' in misspelt["error"]
    assert "refuses these messages: no tools" in refused["error"]
