"""The jobs that come with the package: what they are, and what is made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qaic_ray.errors import JobError, UsageError
from qaic_ray.options import Job
from qaic_ray.pipeline.job import load_job, plan_job
from qaic_ray.shipped.jobs import SHIPPED, job_file, shipped_jobs
from qaic_ray.shipped.new_job import FIRST, write_job

NAMES = ["chat", "dl2q-llama-7b", "dl2q-llama-7b-recipe", "serve", "smollm2", "start"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_package_has_the_repositorys_jobs_and_configs() -> None:
    root = Path(__file__).parents[2]
    assert list(shipped_jobs()) == NAMES
    for name in ("jobs", "configs"):
        assert (SHIPPED.parent / name).resolve() == root / name


def test_a_dl2q_has_a_job_worth_running_and_the_recipes_own() -> None:
    worth, recipe = (load_job(Path(name)) for name in ("dl2q-llama-7b", "dl2q-llama-7b-recipe"))
    assert (worth.export.continuous_batching, worth.compile.batch_size) == (True, (8,))
    assert (recipe.export.continuous_batching, recipe.compile.batch_size) == (False, (1,))
    assert recipe.export.io == "cache-index"
    ((name, argv, runs),) = plan_job(recipe).compiles
    assert name.endswith("-256pl-2048cl-14c-1BS-mx6")
    assert runs
    # Both are of one model and may be run in one folder: neither replaces the other's export.
    ((_, other, _),) = plan_job(worth).compiles
    assert {a for a in argv if a.startswith("-m=")} != {a for a in other if a.startswith("-m=")}
    for job in (worth, recipe):
        assert (job.sdk, job.run.devices, job.compile.num_cores) == ("real", (*range(8),), (14,))


def test_a_job_that_comes_along_is_found_by_its_name(here: Path) -> None:
    assert job_file(Path("smollm2")) == SHIPPED / "smollm2.yaml"
    assert load_job(Path("smollm2")).run.prompts == str(
        SHIPPED.resolve() / "prompts" / "english.jsonl"
    )
    (here / "smollm2").write_text("name: own\nmodel: {name: x}\n")
    assert load_job(Path("smollm2")).name == "own"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("smolm2", r"^There is no job file smolm2 here, .*: chat, .*, start\.$"),
        ("jobs/smollm2.yaml", "^There is no file .*; .* is smollm2, without a folder"),
        ("mine.yaml", r"^There is no file mine\.yaml: name a job file, or one of chat"),
        ("a/smolm2", "^There is no file a/smolm2"),
    ],
)
def test_a_job_that_is_nowhere_is_refused_with_those_there_are(
    here: Path, given: str, message: str
) -> None:
    with pytest.raises(JobError, match=message):
        load_job(Path(given))


@pytest.mark.parametrize("begin_with", NAMES)
def test_a_new_job_is_the_shipped_one_with_its_name_and_own_prompts(
    here: Path, begin_with: str
) -> None:
    new = write_job("mine", begin_with=begin_with)
    assert {path.name for path in here.iterdir()} == {"mine.yaml", "mine-prompts.jsonl"}
    shipped = load_job(Path(begin_with))
    job = load_job(new.path)
    assert job.name == "mine"
    assert job.run.prompts == str(here / "mine-prompts.jsonl")
    assert Path(job.run.prompts).read_text() == Path(str(shipped.run.prompts)).read_text()
    same = shipped.changed("run", prompts=job.run.prompts).model_copy(update={"name": "mine"})
    assert job == same
    assert plan_job(job).compiles == plan_job(shipped).compiles
    before, after = ((SHIPPED / f"{begin_with}.yaml").read_text(), new.path.read_text())
    changed = [(b, a) for b, a in zip(before.split("\n"), after.split("\n"), strict=True) if a != b]
    assert changed == [
        (f"name: {begin_with}", "name: mine"),
        (f"  prompts: {yaml.safe_load(before)['run']['prompts']}", "  prompts: mine-prompts.jsonl"),
    ]


@given(
    model=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60)
)
def test_whatever_a_model_is_called_the_job_names_it(
    tmp_path_factory: pytest.TempPathFactory, model: str
) -> None:
    folder = tmp_path_factory.mktemp("new")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if not is_a_name(model):
            with pytest.raises(UsageError):
                write_job("mine", model=model)
            assert list(folder.iterdir()) == []
            return
        new = write_job("mine", model=model)
        assert load_job(new.path).model.name == model
    document = yaml.safe_load((folder / new.path).read_text())
    assert document["compile"] == yaml.safe_load(shipped_jobs()[FIRST].read_text())["compile"]


def is_a_name(model: str) -> bool:
    try:
        Job.model_validate({"name": "mine", "model": {"name": model}})
    except ValidationError:
        return False
    return bool(model.strip())


@pytest.mark.parametrize("name", ["true", "1e3", "007", "null", "a.b", "Y"])
def test_a_name_that_yaml_would_read_otherwise_stays_a_name(here: Path, name: str) -> None:
    new = write_job(name)
    assert load_job(new.path).name == name
    assert load_job(new.path).run.prompts == str(here / f"{name}-prompts.jsonl")


def test_the_name_of_the_file_is_taken_for_the_jobs(here: Path) -> None:
    assert write_job("mine.yaml").path == Path("mine.yaml")


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("../mine", {}, "cannot be called '../mine': a name is letters, digits"),
        ("", {}, "cannot be called ''"),
        ("-m", {}, "cannot be called '-m'"),
        ("x" * 101, {}, "cannot be called"),
        ("mine", {"begin_with": "nope"}, "No job 'nope' comes with qaic-ray: chat, "),
        ("mine", {"model": " "}, "The model has no name"),
        ("mine", {"model": "a\0b"}, r"model\.name: .* no path"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is(
    here: Path, name: str, more: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_job(name, **more)
    assert list(here.iterdir()) == []


@pytest.fixture
def taken(here: Path) -> Iterator[Path]:
    (here / "mine.yaml").write_text("mine")
    yield here
    assert (here / "mine.yaml").read_text() == "mine"


def test_a_file_that_is_there_stays_and_no_other_is_left(taken: Path) -> None:
    with pytest.raises(UsageError, match=r"mine\.yaml is there already"):
        write_job("mine")
    assert [path.name for path in taken.iterdir()] == ["mine.yaml"]


def test_a_link_that_leads_nowhere_is_not_followed(here: Path) -> None:
    (here / "mine-prompts.jsonl").symlink_to(here / "elsewhere")
    with pytest.raises(UsageError, match=r"mine-prompts\.jsonl is there already"):
        write_job("mine")
    assert [path.name for path in here.iterdir()] == ["mine-prompts.jsonl"]


def test_a_folder_that_takes_no_files_is_named(here: Path) -> None:
    gone = here / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match=r"mine-prompts\.jsonl cannot be written: No such file"):
        write_job("mine")


def test_shipped_prompts_are_rows_with_a_prompt_or_messages() -> None:
    for name, path in shipped_jobs().items():
        prompts = Path(str(load_job(path).run.prompts))
        rows = [json.loads(line) for line in prompts.read_text().splitlines()]
        assert len({row["id"] for row in rows}) == len(rows) > 0, name
        assert all("prompt" in row or "messages" in row for row in rows), name
