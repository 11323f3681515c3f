"""A run's request, kept in its folder and read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qaic_ray import sdk
from qaic_ray.errors import UsageError
from qaic_ray.options import EmulatorOptions, RunOptions
from qaic_ray.pipeline.job import load_job, run_request
from qaic_ray.pipeline.request import REQUEST_NAME, RunRequest, SdkChoice, read_request
from qaic_ray.rows import Prompt
from qaic_ray.sampling_params import SamplingParams

RUN = RunOptions(
    devices=(0, 3),
    prompt="a|b\n– ü",
    prompts_format="openai",
    max_prompts=2,
    shard="3/64",
    sample="5%",
    sample_seed=7,
    output_formats=("parquet",),
    output_parts="s3://bucket/parts",
    part_rows=5000,
    record=3,
    input_len=16,
    ctx_len=64,
    generation_len=9,
    sampling=SamplingParams(temperature=0.5, stop=("x", "\n"), stop_token_ids=(3,), seed=4),
    seed=2**31,
    chat=True,
    system="be: brief",
    add_generation_prompt=False,
    continue_final_message=True,
    chat_template_kwargs={"enable_thinking": False, "parts": [1, {"x": None}]},
    chat_template="{{ messages }}\n  – ",
    date="2031-02-03T04:05:06",
    max_stall_s=0.25,
    prefix_reuse=False,
    drafts="none",
    draft_qpc="/d",
    partitions=2,
)
REQUEST = RunRequest("r", "tiny", Path("/q"), RUN)
# As versions before the option tree kept it.
OLDER = """
name: r
model: tiny
qpc: /q
devices: [0, 3]
prompt: "a|b\\n– ü"
prompts_file: null
prompts_format: openai
output_formats: [parquet]
input_len: 16
ctx_len: 64
generation_len: 9
sampling: {temperature: 0.5, stop: [x, "\\n"], stop_token_ids: [3], seed: 4, logprobs: null}
seed: 2147483648
chat: true
system: 'be: brief'
chat_options:
  add_generation_prompt: false
  continue_final_message: true
  template_kwargs: {enable_thinking: false, parts: [1, {x: null}]}
chat_template: "{{ messages }}\\n  – "
date: '2031-02-03T04:05:06'
max_stall_s: 0.25
prefix_reuse: false
drafts: none
draft_qpc: /d
partitions: 2
group_size: 1
"""


def test_what_is_kept_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / REQUEST_NAME).write_text(REQUEST.to_yaml(), encoding="utf-8")
    assert read_request(tmp_path) == replace(REQUEST, resume=tmp_path)


def test_every_option_differs_from_its_default_here_so_that_none_is_forgotten() -> None:
    plain = RunOptions()
    same = {name for name in RunOptions.model_fields if getattr(RUN, name) == getattr(plain, name)}
    assert same == {"prompts", "group_size", "variant", "output", "metrics"}


def test_a_request_of_an_older_version_is_read(tmp_path: Path) -> None:
    (tmp_path / REQUEST_NAME).write_text(OLDER, encoding="utf-8")
    newer = {"max_prompts": None, "shard": None, "sample": None, "sample_seed": 0}
    newer |= {"output_parts": None, "part_rows": 100_000, "record": None}
    older = replace(REQUEST.with_run(**newer), resume=tmp_path)
    assert read_request(tmp_path) == older
    (tmp_path / REQUEST_NAME).write_text(
        "{name: r, model: m, qpc: /q, devices: null, prompts_file: p, max_stall_s: null}"
    )
    run = read_request(tmp_path).run
    assert (run.devices, run.prompts, run.max_stall_s) == ("all", "p", 1.0)


@pytest.mark.parametrize(("most", "texts"), [(2, ["a", "b"]), (9, ["a", "b", "c"])])
def test_only_the_first_prompts_are_answered(most: int, texts: list[str]) -> None:
    request = RunRequest("r", "tiny", Path("/q"), RunOptions(prompt="a|b|c", max_prompts=most))
    whole = request.with_run(max_prompts=None).open_input()
    first = request.open_input()
    assert [prompt.text for prompt in first.prompts if isinstance(prompt, Prompt)] == texts
    assert (first.source, len(list(whole.prompts))) == (whole.source, 3)


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not the folder of a run: it has no request\.yaml"):
        read_request(tmp_path)


def test_variables_of_a_template_are_checked_before_anything_is_done() -> None:
    for kwargs, words in [({"tokenize": 1}, "'tokenize'"), ({"x": float("nan")}, "not JSON")]:
        with pytest.raises(UsageError, match=words):
            REQUEST.with_run(chat_template_kwargs=kwargs).open_input()


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        "name: r",
        "{name: r, model: m, qpc: q, chat_options: [1]}",
        REQUEST.to_yaml() + "more: 1\n",
    ],
)
def test_a_changed_request_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / REQUEST_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be gone on with") as caught:
        read_request(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_folder_keeps_means_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    request = replace(REQUEST, model="./m", qpc=Path("q"))
    kept = request.with_run(draft_qpc="d", prompt=None, prompts="p").absolute()
    assert (kept.model, kept.run.prompts) == (str(tmp_path / "m"), str(tmp_path / "p"))
    assert (kept.qpc, kept.run.draft_qpc) == (tmp_path / "q", str(tmp_path / "d"))


@pytest.mark.parametrize("name", ["org/name", "smollm2-135m"])
def test_a_models_name_is_no_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    stdin = REQUEST.with_run(prompts="-")
    assert replace(stdin, model=name).absolute().model == name
    assert stdin.absolute().run.prompts == "-"


def test_a_jobs_kept_text_means_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "job.yaml").write_text(
        "name: j\nmodel: {name: m}\nexport: {output: e}\ncompile: {output: c}\n"
        "run: {prompts: p.txt, output: r, draft_qpc: d}\nsdk: s\n"
    )
    document = yaml.safe_load(run_request(load_job(Path("job.yaml"))).job_text)
    assert document["model"]["name"] == str(tmp_path / "m")
    assert document["export"]["output"] == str(tmp_path / "e")
    assert document["compile"]["output"] == str(tmp_path / "c")
    assert document["run"]["prompts"] == str(tmp_path / "p.txt")
    assert document["run"]["output"] == str(tmp_path / "r")
    assert document["run"]["draft_qpc"] == str(tmp_path / "d")
    assert document["sdk"] == str(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "emulated", "variable", "words"),
    [
        ("auto", {}, None, "qaic-ray emulator run -- qaic-runner"),
        ("emulated", {}, None, "qaic-ray emulator run -- qaic-runner"),
        ("auto", {"cards": 2}, None, "qaic-ray emulator run --sdk {root} -- qaic-runner"),
        ("auto", {}, "{root}", "qaic-ray emulator run --sdk {root} -- qaic-runner"),
        ("{root}", {}, None, "qaic-ray emulator run --sdk {root} -- qaic-runner"),
        ("real", None, None, "{root}/exec/qaic-runner"),
    ],
)
def test_a_tool_is_started_as_the_run_found_its_sdk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    emulated: dict[str, Any] | None,
    variable: str | None,
    words: str,
) -> None:
    monkeypatch.delenv(sdk.SDK_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(sdk.SDK_VARIABLE, variable.format(root=tmp_path))
    (tmp_path / sdk.EMULATED_MARKER).write_text("{}")
    here = sdk.Sdk(tmp_path, "real" if emulated is None else "emulated", "1.20")
    choice = SdkChoice(here, name.format(root=tmp_path), EmulatorOptions(**(emulated or {})))
    assert " ".join(choice.tool("qaic-runner")) == words.format(root=tmp_path)
    if emulated is not None:
        monkeypatch.setenv(sdk.NUMERICS_VARIABLE, "fast")
        assert choice.tool("qaic-runner")[0] == "QAIC_EMULATOR_NUMERICS=fast"
