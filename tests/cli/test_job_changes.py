"""Names that hands know, in the commands that take a job: they change its keys, as --set does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_lines import of_name

from qaic_ray.cli.parameters import JOB_KEYS
from qaic_ray.errors import UsageError
from qaic_ray.pipeline import job as job_room
from qaic_ray.pipeline.job import Plan, load_job

JOB = "name: tiny\nmodel: {name: m}\nrun: {prompts: p.txt, generation_len: 5, devices: [1]}\n"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The jobs that `plan` comes to plan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    jobs: list[Any] = []

    def planned(job: Any) -> Plan:
        jobs.append(job)
        return Plan(job.name, "nothing", ())

    monkeypatch.setattr(job_room, "plan_job", planned)
    return jobs


def plan(*words: str) -> None:
    context = of_name("plan").make_context("plan", ["job.yaml", *words])
    context.command.invoke(context)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("-m", "other"), "model.name", "other"),
        (("--model_name=other",), "model.name", "other"),
        (("--prompt", "a|b"), "run.prompt", "a|b"),
        (("-i", "q.jsonl"), "run.prompts", "{here}/q.jsonl"),
        (("--prompts_file", "-"), "run.prompts", "-"),
        (("--max-tokens", "9"), "run.generation_len", 9),
        (("--generation_len", "9"), "run.generation_len", 9),
        (("--device_id", "0,3"), "run.devices", (0, 3)),
        (("--devices", "all"), "run.devices", "all"),
        (("--sdk", "emulated"), "sdk", "emulated"),
        (("-o", "elsewhere"), "run.output", "elsewhere"),
    ],
)
def test_a_name_changes_its_key_and_no_other(
    words: tuple[str, ...], key: str, value: Any, called: list[Any], tmp_path: Path
) -> None:
    assert key in JOB_KEYS
    plan(*words)
    (job,) = called
    before, after = flat(load_job(Path("job.yaml"))), flat(job)
    changed = {name: after[name] for name in after if after[name] != before[name]}
    if key == "run.prompt":  # it takes the place of the prompts
        assert changed.pop("run.prompts") is None
    assert changed == {key: value.format(here=tmp_path) if isinstance(value, str) else value}


def flat(job: Any) -> dict[str, Any]:
    """Dotted key -> value."""

    def below(place: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from below(f"{place}{name}.", value)
            else:
                yield f"{place}{name}", value

    return dict(below("", job.model_dump()))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--max-tokens", "0"), "--max-tokens must be at least 1, not 0."),
        (("--generation-len", "x"), "--generation-len takes a whole number, not 'x'."),
        (("--device-id", "0,0"), "--device-id: holds the same value twice: device 0 is given"),
        (("--device-id", "one"), "--device-id takes a whole number, or several"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_that_was_typed(
    words: tuple[str, ...], sentence: str, called: list[Any]
) -> None:
    with pytest.raises(UsageError) as refused:
        plan(*words)
    assert sentence in str(refused.value)
    assert called == []


def test_launch_has_the_same_names(called: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    call = of_name("launch")._call
    monkeypatch.setattr(call, "_function", lambda **arguments: given.append(arguments["changes"]))
    words = ["job.yaml", "-i", "q.txt", "-o", "runs", "--max-tokens", "3", "--sdk", "real"]
    context = of_name("launch").make_context("launch", [*words, "--device-id", "1"])
    context.command.invoke(context)
    assert given[0].values == {
        "run.prompts": "q.txt",
        "run.output": "runs",
        "run.generation_len": 3,
        "sdk": "real",
        "run.devices": (1,),
    }
