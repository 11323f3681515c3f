"""A look at prompts before a run: counted and tokenized as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_tokens import byte_tokenizer
from transformers import AutoTokenizer

from qaic_ray.errors import UsageError
from qaic_ray.model.checkpoint import Checkpoint
from qaic_ray.options import RunOptions
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.worker.survey import SURVEYED_ROWS, Survey, count_sequences, survey

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("survey") / "m"
    folder.mkdir()
    byte_tokenizer("<end>").save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Checkpoint(str(folder), folder, "m", {}, (2,), ())


def test_typed_prompts_are_counted_and_measured(checkpoint: Checkpoint) -> None:
    theirs = AutoTokenizer.from_pretrained(checkpoint.folder)
    texts = ["a", "日本語 – naïve", "", "bcd"]
    longest = max(len(theirs(text)["input_ids"]) for text in texts)
    # The empty one is no prompt.
    assert survey(RunOptions(prompt="|".join(texts)), checkpoint) == Survey(3, longest, None)


def test_a_chat_is_as_long_as_its_template_makes_it(checkpoint: Checkpoint) -> None:
    theirs = AutoTokenizer.from_pretrained(checkpoint.folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    run = RunOptions(prompt="Hi", chat=True, system="Be brief.")
    assert survey(run, checkpoint).longest_prompt == len(ids)


def test_a_row_s_own_fields_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "a", "n": 3, "temperature": 1, "max_tokens": 5},
        {"prompt": "b", "max_tokens": 90},
        {"nothing": 1},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert survey(RunOptions(prompts=str(path)), checkpoint) == Survey(4, 1, 90)
    path.write_text(path.read_text() + '{"prompt": "c"}\n')
    assert survey(RunOptions(prompts=str(path)), checkpoint).longest_answer is None
    bound = RunOptions(prompts=str(path), sampling=SamplingParams(max_tokens=7))
    assert survey(bound, checkpoint).longest_answer == 90


def test_only_the_first_rows_of_a_long_file_are_read(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "p.txt"
    path.write_text("aa\n" * SURVEYED_ROWS)
    assert survey(RunOptions(prompts=str(path)), checkpoint).num_sequences == SURVEYED_ROWS
    path.write_text("aa\n" * SURVEYED_ROWS + "b" * 50 + "\n")
    assert survey(RunOptions(prompts=str(path)), checkpoint) == Survey(None, 2, None)
    few = RunOptions(prompts=str(path), max_prompts=3)
    assert survey(few, checkpoint).num_sequences == 3


def test_a_stream_is_not_touched(checkpoint: Checkpoint) -> None:
    assert survey(RunOptions(prompts="-"), checkpoint) == Survey()
    assert count_sequences(RunOptions(prompts="-"), 5) is None


def test_a_file_that_is_not_there_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="no prompts file gone"):
        survey(RunOptions(prompts="gone.txt"), checkpoint)


def test_the_first_rows_of_a_folder_are_looked_at(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aa\nbbbb\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "c", "n": 2, "temperature": 1}\n')
    assert survey(RunOptions(prompts=str(tmp_path)), checkpoint) == Survey(4, 4, None)
    # Each shard is of the same program, whichever rows it has.
    shard = RunOptions(prompts=str(tmp_path), shard="2/2")
    assert survey(shard, checkpoint) == Survey(4, 4, None)
    assert count_sequences(RunOptions(prompts=str(tmp_path)), 3) is None


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ({"shard": "2/3"}, 14),
        ({"sample": "10%"}, 4),
        ({"sample": "10%", "shard": "1/4"}, 1),
        ({"sample": 7}, 7),
        ({"sample": 7, "shard": "1/4"}, 7),
        ({"max_prompts": 3, "shard": "1/4"}, 3),
        ({}, 40),
    ],
)
def test_cards_are_opened_for_the_rows_that_are_answered(
    said: dict[str, object], number: int, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a\n" * 40)
    assert count_sequences(RunOptions(prompts=str(tmp_path), **said), 50) == number


def test_prompts_that_cannot_be_read_are_refused_before_anything_is_made(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="nothing in"):
        survey(RunOptions(prompts=str(path)), checkpoint)
