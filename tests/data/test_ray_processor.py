"""A processor on a dataset of this process, whose cards answer by rule. No Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rule_worker import RulePredictor, RuleWorker, cards_only

from qaic_ray.cards.lease import LOCKS_VARIABLE
from qaic_ray.data import QAICEngineProcessorConfig, build_processor, processor
from qaic_ray.data.answering import CardAnswers
from qaic_ray.errors import RowError, UsageError
from qaic_ray.options import ModelOptions, VariantChoice
from qaic_ray.rows import Prompt

DataRow = dict[str, Any]


class LocalDataset:
    """`map` and `map_batches` as Ray Data calls functions and actors, and rows as it gives them."""

    def __init__(self, rows: list[DataRow], given: dict[str, Any] | None = None) -> None:
        self.rows, self.given = rows, given if given is not None else {}

    def map(self, function: Callable[[DataRow], DataRow], **given: Any) -> LocalDataset:
        self.given.setdefault("map", []).append(given)
        return LocalDataset([function(row) for row in self.rows], self.given)

    def map_batches(self, kind: type[CardAnswers], **given: Any) -> LocalDataset:
        self.given |= given
        actor, size = kind(**given["fn_constructor_kwargs"]), given["batch_size"]
        rows = [row["__data"] for row in self.rows]
        batches = [column(rows[at : at + size]) for at in range(0, len(rows), size)]

        async def answered() -> list[list[DataRow]]:
            return await asyncio.gather(*(batch_of(actor, batch) for batch in batches))

        try:
            done = asyncio.run(answered())
        finally:
            actor.close()
        return LocalDataset([{"__data": row} for rows in done for row in rows], self.given)


async def batch_of(actor: CardAnswers, batch: Any) -> list[DataRow]:
    (answered,) = [each async for each in actor({"__data": batch})]
    rows: list[DataRow] = answered["__data"]
    return rows


def column(rows: list[DataRow]) -> Any:
    """A column of structs: every row has every key, lists are arrays."""
    keys = dict.fromkeys(key for row in rows for key in row)
    made = np.empty(len(rows), object)
    for at, row in enumerate(rows):
        made[at] = {key: as_array(row.get(key)) for key in keys}
    return made


def as_array(value: Any) -> Any:
    if isinstance(value, list):
        return np.array([as_array(item) for item in value], object)
    return {k: as_array(v) for k, v in value.items()} if isinstance(value, dict) else value


class OwnSdk(RulePredictor):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given | {"sdk": cards_only()})


@pytest.fixture(autouse=True)
def _rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(LOCKS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(RuleWorker, "opened", [])
    monkeypatch.setattr(RuleWorker, "broken", set())
    monkeypatch.setattr(CardAnswers, "predictor_class", OwnSdk)
    monkeypatch.setattr(processor, "actor_pool", lambda *sizes: sizes)
    yield
    assert not any(worker.is_open for worker in RuleWorker.opened)


def config(**fields: Any) -> QAICEngineProcessorConfig:
    return QAICEngineProcessorConfig(**{"model_source": "m", "qpc": "q", **fields})


def asked() -> list[Prompt]:
    return sorted(RuleWorker.opened[-1].asked, key=lambda prompt: prompt.index)


def test_a_program_as_ray_s_page_has_it() -> None:
    """The example of `build_processor`, with the config changed."""
    built = build_processor(
        config(
            engine_kwargs={
                "enable_prefix_caching": True,
                "enable_chunked_prefill": True,
                "max_num_batched_tokens": 4096,
            },
            concurrency=1,
            batch_size=64,
        ),
        preprocess=lambda row: {
            "messages": [
                {"role": "system", "content": "You are a calculator"},
                {"role": "user", "content": f"{row['id']} ** 3 = ?"},
            ],
            "sampling_params": {"temperature": 0.3, "max_tokens": 20, "detokenize": False},
        },
        postprocess=lambda row: {"resp": row["generated_text"], **row},
    )
    rows = built(LocalDataset([{"id": at} for at in range(300)])).rows  # type: ignore[arg-type, attr-defined]
    assert [row["id"] for row in rows] == list(range(300))
    assert [row["resp"] for row in rows] == [f"{at} ** 3 = ?"[::-1] for at in range(300)]
    assert all(row["generated_tokens"] == list(map(ord, row["resp"])) for row in rows)
    assert all(row["num_generated_tokens"] == len(row["resp"]) for row in rows)
    assert {row["__inference_error__"] for row in rows} == {""}
    assert len({row["request_id"] for row in rows}) == 300
    assert len({row["batch_uuid"] for row in rows}) == 5
    assert "sampling_params" not in rows[0]
    json.dumps([{k: v for k, v in row.items() if k != "messages"} for row in rows])
    params = {prompt.sampling for prompt in asked()}
    assert {(p.temperature, p.max_tokens) for p in params if p} == {(0.3, 20)}
    assert asked()[0].messages is not None
    assert [message["role"] for message in asked()[0].messages] == ["system", "user"]


def test_what_a_row_does_not_say_is_vllm_s_default_or_the_config_s() -> None:
    rows = [{"prompt": "a", "sampling_params": {"top_k": 5}}, {"prompt": "b"}]
    build_processor(config())(LocalDataset(list(rows)))  # type: ignore[arg-type]
    first = asked()[0].sampling
    assert first is not None
    assert (first.temperature, first.max_tokens, first.top_k) == (1.0, 16, 5)
    defaults = RuleWorker.opened[-1].spec.generation.sampling
    assert (defaults.temperature, defaults.max_tokens) == (1.0, 16)
    build_processor(config(sampling={"max_tokens": 3}))(LocalDataset(list(rows)))  # type: ignore[arg-type]
    assert asked()[1].sampling is None
    assert RuleWorker.opened[-1].spec.generation.sampling.max_tokens == 3


def test_columns_of_a_dataset_are_no_fields_of_a_row() -> None:
    """A data set may have a column `seed` or `n` of its own."""
    rows = [{"prompt": "ab", "seed": "apple", "n": "north", "temperature": 40.5, "max_token": 1}]
    (row,) = build_processor(config())(LocalDataset(rows)).rows  # type: ignore[arg-type, attr-defined]
    assert (row["generated_text"], row["seed"], row["n"]) == ("ba", "apple", "north")


def test_a_conversation_that_ends_with_an_answer_is_gone_on_with() -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    rows = [{"messages": said}, {"messages": said[:1]}]
    built = build_processor(config(), builder_kwargs={"chat_template_kwargs": {"thinking": True}})
    built(LocalDataset(rows))  # type: ignore[arg-type]
    goes_on, begins = (prompt.chat for prompt in asked())
    assert goes_on is not None
    assert (goes_on.continue_final_message, goes_on.add_generation_prompt) == (True, False)
    assert goes_on.template_kwargs == {"thinking": True}
    assert begins is not None
    assert (begins.continue_final_message, begins.add_generation_prompt) == (False, True)


def test_without_the_chat_stage_the_prompt_is_the_text() -> None:
    rows = [{"prompt": "ab", "messages": [{"role": "user", "content": "no"}]}]
    built = build_processor(config(chat_template_stage=False))
    assert built(LocalDataset(list(rows))).rows[0]["generated_text"] == "ba"  # type: ignore[arg-type, attr-defined]
    assert build_processor(config())(LocalDataset(rows)).rows[0]["generated_text"] == "on"  # type: ignore[arg-type, attr-defined]


BAD = [{"prompt": "ab"}, {"prompt": "bad"}, {"prompt": ""}, {"prompt": "kill"}]


def test_errors_are_rows_that_go_past_postprocess_where_that_is_wanted() -> None:
    built = build_processor(
        config(should_continue_on_error=True), postprocess=lambda row: {"r": row["generated_text"]}
    )
    rows = built(LocalDataset(list(BAD))).rows  # type: ignore[arg-type, attr-defined]
    assert rows[0] == {"r": "ba", "__inference_error__": ""}
    assert [row["__inference_error__"].split()[0] for row in rows[1:]] == ["It", "The", "The"]
    assert [row["prompt"] for row in rows[1:]] == ["bad", "", "kill"]
    assert {row["generated_text"] for row in rows[1:]} == {""}
    assert {row["request_id"] for row in rows[1:]} == {-1}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "bad"}, "It is bad. With should_continue_on_error"),
        ({"prompt": "a", "sampling_params": {"temprature": 1.0}}, "temprature"),
        ({"prompt": "a", "sampling_params": {"structured_outputs": {"json": "{"}}}, "structured"),
        ({"tokenized_prompt": [1, 2]}, 'no "prompt" and no "messages"'),
        ({"prompt": "a", "multimodal_data": {"image": [1]}}, "only text can be answered"),
        ({"question": "a"}, "prompt"),
    ],
)
def test_an_error_ends_the_whole_by_default(row: DataRow, words: str) -> None:
    with pytest.raises(RowError, match=words):
        build_processor(config())(LocalDataset([{"prompt": "ab"}, row]))  # type: ignore[arg-type]


def test_logprobs_and_choices_come_where_they_are_asked_for() -> None:
    params = {"n": 2, "logprobs": 0, "temperature": 0.5}
    rows = [{"prompt": "ab", "sampling_params": params}, {"prompt": "cd"}]
    answered = build_processor(config())(LocalDataset(rows)).rows  # type: ignore[arg-type, attr-defined]
    assert answered[0]["choices"] == ["ba", "ba"]
    assert answered[0]["logprobs"] == [-1.0, -1.0]
    assert not {"choices", "logprobs"} & answered[1].keys()


def test_ray_data_is_told_what_a_worker_needs() -> None:
    dataset = LocalDataset([])
    build_processor(
        config(concurrency=(2, 4), batch_size=9, max_concurrent_batches=3, cards_per_worker=0.5,
               max_tasks_in_flight_per_actor=5, ctx_len=128, log_engine_metrics=False),
        preprocess_map_kwargs={"num_cpus": 0.5}, postprocess_map_kwargs={"num_cpus": 0.25},
    )(dataset)  # type: ignore[arg-type]  # fmt: skip
    given = dataset.given
    assert given["map"] == [{"num_cpus": 0.5}, {"num_cpus": 0.25}]
    assert given["compute"] == (2, 4, 5)
    assert (given["batch_size"], given["max_concurrency"]) == (9, 3)
    assert given["resources"] == {"QAIC": 0.5}
    made = given["fn_constructor_kwargs"]
    assert made["predictor"]["ctx_len"] == 128
    assert Path(made["predictor"]["qpc"]) == Path("q").absolute()
    assert (made["num_batches"], made["metrics"]) == (3, False)


def test_without_a_program_one_is_made_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[ModelOptions, VariantChoice]] = []

    def prepare(model: ModelOptions, shapes: VariantChoice, *_: object) -> Path:
        made.append((model, shapes))
        return tmp_path / "made"

    monkeypatch.setattr(processor, "prepare", prepare)
    monkeypatch.setattr(processor, "choose_sdk", lambda *_: None)
    monkeypatch.setattr(processor, "cores_here", lambda _, partitions: 14 // partitions)
    built = build_processor(
        config(qpc=None, slots=4, engine_kwargs={"max_model_len": 256}, cards_per_worker=0.5)
    )
    ((model, shapes),) = made
    assert model.name == "m"
    assert (shapes.batch_size, shapes.ctx_len, shapes.num_cores) == (4, 256, 7)
    assert built.qpc == tmp_path / "made"
    assert "ctx_len" not in built.constructor_kwargs()["predictor"]
    assert built.list_stage_names() == ["CardAnswers"]


def test_what_a_program_cannot_be_made_of_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAIC_RAY_SDK", "emulated")
    with pytest.raises(UsageError, match="no-such-model"):
        build_processor(config(qpc=None, model_source="./no-such-model"))
