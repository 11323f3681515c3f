"""The Job tree: read once, frozen, misspelt keys refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from qaic_ray import options
from qaic_ray.cli import parameters
from qaic_ray.engine.batching.stalls import MAX_STALL_S
from qaic_ray.errors import JobError
from qaic_ray.option_types import Section, prompt_lens
from qaic_ray.options import Job, RunOptions
from qaic_ray.pipeline.job import dump_job, job_from, load_job
from qaic_ray.sampling_params import FIELDS, SamplingParams

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
SMALL = {"name": "small", "model": {"name": "smollm2-135m"}}


def with_part(part: str, **keys: object) -> dict[str, object]:
    return {**SMALL, part: keys}


def test_shipped_jobs_are_read() -> None:
    assert {path.name for path in JOBS} >= {"smollm2.yaml", "dl2q-llama-7b.yaml", "start.yaml"}
    for path in JOBS:
        assert load_job(path).name == path.stem


def test_every_part_is_frozen_and_refuses_unknown_keys() -> None:
    parts = [
        part
        for part in (*vars(options).values(), *vars(parameters).values())
        if isinstance(part, type) and issubclass(part, Section)
    ]
    assert len(parts) >= 15
    for part in parts:
        assert part.model_config["frozen"]
        assert part.model_config["extra"] == "forbid"
    with pytest.raises(ValidationError, match="frozen"):
        job_from(SMALL, source="x").name = "other"  # type: ignore[misc]


def test_written_job_reads_back_equal() -> None:
    job = job_from(with_part("compile", precision=["mx6", "fp16"], num_cores=7), source="x")
    assert job_from(yaml.safe_load(dump_job(job)), source="x") == job


def test_a_value_that_is_written_twice_is_one() -> None:
    twice = with_part("compile", precision=["mx6", "mx6"], batch_size=[4, 1, 4])
    grid = job_from(twice, source="x").compile
    assert (grid.precision, grid.batch_size) == (("mx6",), (4, 1))


def test_single_value_stands_for_a_list_of_one() -> None:
    assert job_from(with_part("compile", num_cores=7), source="x").compile.num_cores == (7,)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**SMALL, "compil": {}}, "unknown key 'compil'; did you mean 'compile'"),
        (with_part("compile", precison="mx6"), "'compile.precison'; did you mean 'precision'"),
        (with_part("run", zzz=1), "unknown key 'run.zzz'; known here: prompt, prompts, "),
        (with_part("compile", precision="mx7"), r"compile\.precision.*'mx7'"),
        (with_part("compile", num_cores=0), r"compile\.num_cores.*given: 0"),
        (with_part("compile", num_cores=17), r"compile\.num_cores.*given: 17"),
        (with_part("compile", prompt_len=48), "power of two, not 48"),
        (with_part("compile", prompt_len=64, ctx_len=32), "64 does not fit into ctx_len 32"),
        (with_part("compile", batch_size=[]), "at least one value"),
        (with_part("compile", prompt_len="32+48"), "power of two, not 48"),
        (with_part("compile", prompt_len="32+"), "several like 32.128 .given: '32.'"),
        (with_part("compile", num_speculative_tokens=3), "needs export.logits: num_logits_to_keep"),
        (
            with_part("compile", prefill_rows=2, batch_size=[8, 1], prompt_len=32),
            "prefill_rows 2 is more than batch_size 1",
        ),
        (
            with_part("compile", prefill_rows=2, batch_size=8, prompt_len=[32, 1]),
            "prefill_rows 2 needs a prefill: a program of prompt_len 1",
        ),
        (
            with_part("compile", prefill_rows=2, batch_size=2)
            | {"export": {"continuous_batching": False}},
            "all rows of a static program are in each of its prefills already",
        ),
        (with_part("compile", prefill_rows=0), r"compile\.prefill_rows: must be at least 1, not 0"),
        (with_part("compile", comp_ctx_lengths=[512]), "needs export.comp_ctx_lengths: true"),
        (
            with_part("compile", comp_ctx_lengths=4096) | {"export": {"comp_ctx_lengths": True}},
            "comp_ctx_lengths 4096 does not fit into ctx_len 2048",
        ),
        (with_part("run", devices=[0, 0]), "same value twice"),
        (with_part("run", sampling={"temprature": 1}), "did you mean temperature"),
        (with_part("run", sampling={"top_p": 0}), r"run\.sampling: top_p is 0; allowed is"),
        (
            with_part("run", sampling={"structured_outputs": {"regex": "("}}),
            r"run\.sampling: structured_outputs\.regex cannot be followed: unclosed group",
        ),
        (with_part("run", sampling={"max_tokens": 4}), "another name in a job, run.generation_len"),
        (
            with_part("run", sampling=[1]),
            r"run\.sampling: must be an object \(SamplingParams\), not \[1\]",
        ),
        (with_part("run", seed=-1), r"run\.seed: must be at least 0, not -1"),
        (with_part("run", devices=[-1]), "device ids from 0"),
        (with_part("run", prompt="a", prompts="b"), "keep one of them"),
        (with_part("emulator", sku="lite"), "'lite'"),
        (with_part("run", devices=["all", 0]), "device ids from 0"),
        (with_part("run", max_stall_s=float("inf")), r"run\.max_stall_s"),
        (
            with_part("compile", ctx_len=2**31),
            r"ctx_len\[0\]: must be at most 2147483647, not 2147483648",
        ),
        (with_part("compile", ctx_len=True), r"compile\.ctx_len.*must be a number"),
        (with_part("compile", batch_size=[1] * 5000), "at most 1024 values .given: a list of 5000"),
        (
            with_part("compile", batch_size=list(range(1, 999)), ctx_len=list(range(256, 999))),
            "grid of 741514 variants: at most 1000",
        ),
        (with_part("compile", output="a\0b"), r"compile\.output: it is 'a.x00b', which is no path"),
        (with_part("run", prompts="~nosuchuser/x"), r"run\.prompts: .*home directory"),
        ({**SMALL, "model": {"name": "x" * 5000}}, r"model\.name: .*File name too long"),
        ({**SMALL, "sdk": "a" * 5000}, "sdk: .*File name too long"),
        ({"name": "x"}, "the key 'model' is missing"),
        ({**SMALL, "name": "../x"}, "name: .*'../x'"),
    ],
)
def test_wrong_jobs_are_refused_in_one_sentence(document: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        job_from(document, source="job.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("job.yaml: ")


def test_overrides_change_one_key(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    job = load_job(path, ["run.generation_len=7", "compile.precision=[mx6, fp16]"])
    assert job.run.generation_len == 7
    assert job.compile.precision == ("mx6", "fp16")


def test_sampling_is_read_checked_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "run": {"sampling": {"stop": "a", "seed": 3}}}))
    job = load_job(path, ["run.sampling.temperature=0.7", "run.sampling.stop_token_ids=[4]"])
    assert job.run.sampling == SamplingParams(
        temperature=0.7, seed=3, stop=("a",), stop_token_ids=(4,)
    )
    written = yaml.safe_load(dump_job(job))
    assert set(written["run"]["sampling"]) == set(FIELDS) - {"max_tokens", "max_completion_tokens"}
    assert job_from(written, source="x") == job
    assert job_from(with_part("run", sampling=None), source="x").run.sampling == SamplingParams()


def test_defaults_are_the_engines() -> None:
    assert RunOptions().max_stall_s == MAX_STALL_S


def test_prompt_lens_together_are_one_entry_of_the_grid() -> None:
    job = job_from(with_part("compile", prompt_len=[16, "32+128"]), source="x")
    assert job.compile.prompt_len == (16, "32+128")
    assert [prompt_lens(value) for value in job.compile.prompt_len] == [(16,), (32, 128)]
    assert job_from(yaml.safe_load(dump_job(job)), source="x") == job


@pytest.mark.parametrize("override", ["run.generation_len", "=3", "name.x=1", "run.x=[1", "zz=1"])
def test_wrong_overrides_are_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(JobError):
        load_job(path, [override])


def test_prompts_file_is_beside_the_job(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(with_part("run", prompts="prompts/a.jsonl")))
    assert load_job(path).run.prompts == str(tmp_path / "prompts" / "a.jsonl")


def test_a_jobs_chat_template_is_beside_it_and_its_variables_are_plain(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    kwargs = {"enable_thinking": False, "depth": [1, "x", None]}
    part = with_part("run", chat_template="t.jinja", chat_template_kwargs=kwargs, date="2031-02-03")
    path.write_text(yaml.safe_dump(part))
    run = load_job(path, ["run.chat_template_kwargs.depth=2"]).run
    assert run.chat_template == str(tmp_path / "t.jinja")
    assert run.chat_template_kwargs == {"enable_thinking": False, "depth": 2}
    assert run.date == "2031-02-03T00:00:00"
    with pytest.raises(JobError, match=r"run\.date"):
        load_job(path, ["run.date='31.1.2031'"])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "!!python/object:os.system {}"])
def test_files_that_are_no_job_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(JobError, match=r"x\.yaml"):
        load_job(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="gone"):
        load_job(tmp_path / "gone.yaml")


def test_defaults_are_a_whole_job() -> None:
    assert isinstance(job_from(SMALL, source="x"), Job)


PROMPTS = {"prompts": "p.txt", "prompts_format": "text", "generation_len": 5}


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job in a folder of its own; the caller is in another one."""
    folder, work = tmp_path / "jobs", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(with_part("run", **PROMPTS)))
    return path


def test_parts_of_an_input_are_beside_the_job_too(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    parts = ["parts/*.jsonl", "s3://bucket/more", "/far"]
    path.write_text(yaml.safe_dump(with_part("run", prompts=parts)))
    there = (f"{tmp_path}/parts/*.jsonl", "s3://bucket/more", "/far")
    assert load_job(path).run.prompts == there
    path.write_text(dump_job(load_job(path)))
    assert load_job(path).run.prompts == there
    run = load_job(path, changes={"run.prompts": ("a", "gs://b/c")}).run
    assert run.prompts == (str(Path.cwd() / "a"), "gs://b/c")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("prompts", [], "must name a file, a folder, a glob or a URI"),
        ("prompts", ["a", 3], "must be a text, or a list of texts"),
        ("shard", "0/3", "K from 1 to N"),
        ("shard", 3, "must be K/N"),
        ("sample", 0, "must be a number of rows"),
        ("sample", "101%", "a share over 0 and up to 100%"),
    ],
)
def test_what_is_no_part_of_an_input(key: str, value: object, words: str) -> None:
    with pytest.raises(JobError, match=rf"run\.{key}: .*{words}"):
        job_from(with_part("run", **{key: value}), source="job.yaml")


def test_prompts_of_the_caller_start_in_the_callers_folder(job_file: Path) -> None:
    assert load_job(job_file).run.prompts == str(job_file.parent / "p.txt")
    run = load_job(job_file, changes={"run.prompts": "mine.jsonl"}).run
    assert run.prompts == str(Path.cwd() / "mine.jsonl")
    assert run.prompts_format is None  # it was said of the file's own prompts
    assert load_job(job_file, changes={"run.prompts": "-"}).run.prompts == "-"


def test_a_prompt_takes_the_place_of_prompts_and_back(job_file: Path) -> None:
    run = load_job(job_file, changes={"run.prompt": "a|b"}).run
    assert (run.prompt, run.prompts, run.prompts_format) == ("a|b", None, None)
    job_file.write_text(yaml.safe_dump(with_part("run", prompt="a")))
    run = load_job(job_file, changes={"run.prompts": "/p.txt"}).run
    assert (run.prompt, run.prompts) == (None, "/p.txt")


def test_what_is_set_goes_before_what_is_changed(job_file: Path) -> None:
    changes = {"run.generation_len": 7, "run.devices": (0, 1), "model.name": "other"}
    job = load_job(job_file, ["run.generation_len=9"], changes=changes)
    assert job.run.generation_len == 9
    assert (job.run.devices, job.model.name) == ((0, 1), "other")


def test_a_key_of_what_is_no_mapping_cannot_be_changed(job_file: Path) -> None:
    job_file.write_text("name: x\nmodel: smollm2-135m\n")
    with pytest.raises(JobError, match="'model' is not a mapping in the job"):
        load_job(job_file, changes={"model.name": "other"})
    with pytest.raises(JobError, match="'model' is not a mapping in the job"):
        load_job(job_file, ["model.name=other"])
