"""One worker on a card of formulas: what rows ask for is what they get, alone and in company."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from formula_program import EOS, VOCAB, FormulaProgram, answer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from qaic_ray.contract import Specializations
from qaic_ray.errors import DeviceError, DeviceLost, UsageError
from qaic_ray.model import chat
from qaic_ray.model.tokenizer import Tokenizer, text_parts
from qaic_ray.options import Generation
from qaic_ray.rows import ChatOptions, ErrorClass, FinishReason, Prompt, Row
from qaic_ray.sampling_params import MAX_SEED, SamplingParams
from qaic_ray.worker.text import BEGINNING_CHARS, Answer, Answerer, sample_seed
from qaic_ray.worker.worker import CardWorker, WorkerSpec

LETTERS = [chr(ord("A") + index) for index in range(VOCAB)]
CTX_LEN = 40
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role[0] | upper }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)

YEAR = "{{ 'J' if strftime_now('%Y') == '1999' else 'K' }}{{ messages[0].content }}"


def letters(chat_template: str | None = TEMPLATE, special: str | None = None) -> Tokenizer:
    """A token a letter from A on; one of them may be special."""
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="A"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    if special is not None:
        backend.add_special_tokens([special])
    return Tokenizer(backend, {"chat_template": chat_template}, (EOS,))


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(map(LETTERS.index, text))


def text_of(ids: list[int]) -> str:
    return "".join(LETTERS[id_] for id_ in ids)


class FormulaSession(FormulaProgram):
    simulated_time = None
    vocab_size = VOCAB

    def close(self) -> None:
        self.calls.clear()


def held(session: FormulaSession) -> tuple[FormulaSession, ExitStack]:
    stack = ExitStack()
    stack.callback(session.close)
    return session, stack


Open = Callable[..., CardWorker]


@pytest.fixture
def open_worker() -> Iterator[Open]:
    """Open a worker on a card of formulas; what it is given is the `Generation`'s."""
    opened: list[CardWorker] = []

    def open_one(
        *,
        slots: int = 3,
        ctx_len: int = CTX_LEN,
        tokenizer: Tokenizer | None = None,
        folder: Path = Path(),
        text: Mapping[str, str] = MappingProxyType({}),
        **generation: object,
    ) -> CardWorker:
        shapes = Specializations.build(
            batch_size=slots, prompt_len=4, ctx_len=ctx_len, continuous=True
        )

        class FormulaWorker(CardWorker):
            open_checkpoint = staticmethod(  # type: ignore[assignment]
                lambda *_, **__: SimpleNamespace(eos_ids=(EOS,), config={}, folder=folder)
            )
            load_tokenizer = staticmethod(lambda _: tokenizer or letters())
            open_sdk = staticmethod(  # type: ignore[assignment]
                lambda _: SimpleNamespace(description="formulas")
            )
            open_session = staticmethod(  # type: ignore[assignment]
                lambda *_, **__: held(FormulaSession(shapes))
            )

        made = Generation(**generation)  # type: ignore[arg-type]
        worker = FormulaWorker(
            WorkerSpec(
                name="card 0",
                device_ids=(0,),
                sdk_root="",
                qpc="",
                model="",
                generation=made,
                text=text,
            )
        )
        worker.open()
        opened.append(worker)
        return worker

    yield open_one
    for worker in opened:
        worker.close()


def answers(worker: CardWorker, *prompts: Prompt, attempt: int = 1) -> list[Row]:
    rows = [row for some in worker.answer(prompts, attempt) for row in some]
    assert len(rows) == len(prompts)
    return sorted(rows, key=lambda row: row.index)


def prompt(text: str = "HELLO", index: int = 0, **sampling: object) -> Prompt:
    own = SamplingParams(**sampling) if sampling else None  # type: ignore[arg-type]
    return Prompt(index, text, sampling=own)


def greedy(text: str = "HELLO", limit: int = CTX_LEN) -> list[int]:
    return answer(ids_of(text), min(limit, CTX_LEN - len(text) + 1))


# -- where answers end


def test_a_row_is_the_formulas_answer_up_to_eos(open_worker: Open) -> None:
    rows = answers(open_worker(), *(prompt(text, i) for i, text in enumerate(["HI", "YES", "NO"])))
    for row, text in zip(rows, ["HI", "YES", "NO"], strict=True):
        expected = greedy(text)
        ended = expected[-1] == EOS
        assert list(row.token_ids) == expected
        assert row.text == text_of(expected[:-1] if ended else expected)
        assert row.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert row.stop_reason is None
        assert (row.prompt_tokens, row.choices, row.logprobs) == (len(text), (), None)
        assert row.ttft_s > 0


def test_a_rows_times_of_day_fit_its_durations(open_worker: Open) -> None:
    before = time.time()
    rows = answers(open_worker(slots=1), *(prompt(text, i) for i, text in enumerate(["HI", "YES"])))
    after = time.time()
    for row in rows:
        assert row.started_at is not None
        assert row.ended_at is not None
        assert row.queue_s is not None
        assert before <= row.started_at < row.ended_at <= after + 0.1
        whole_s = row.ended_at - row.started_at
        assert 0 <= row.queue_s <= whole_s - row.decode_s
        assert row.ttft_s + row.decode_s <= whole_s + 1e-6  # the engine has it later
    first, second = rows  # of one shard, and one slot: the second waits for the first
    assert first.started_at == second.started_at
    assert second.queue_s > first.queue_s


def test_a_rows_own_limit_goes_before_the_runs(open_worker: Open) -> None:
    worker = open_worker(sampling=SamplingParams(max_tokens=3))
    shorter, plain, longer = answers(
        worker, prompt(max_tokens=2), prompt(index=1), prompt(index=2, max_tokens=6)
    )
    assert [row.token_ids for row in (shorter, plain, longer)] == [
        tuple(greedy(limit=limit)) for limit in (2, 3, 6)
    ]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_row_with_the_token_that_completes_it(
    open_worker: Open, include: bool
) -> None:
    expected = greedy(limit=8)
    stop = text_of(expected[3:5])
    own = {"stop": ("zz", stop), "include_stop_str_in_output": include}
    (row,) = answers(open_worker(), prompt(max_tokens=30, **own))
    assert list(row.token_ids) == expected[:5]
    assert (row.finish_reason, row.stop_reason) == (FinishReason.STOP, stop)
    assert row.text == text_of(expected[: 5 if include else 3])


def test_a_stop_string_in_the_last_tokens_counts(open_worker: Open) -> None:
    expected = greedy(limit=4)
    (row,) = answers(open_worker(), prompt(max_tokens=4, stop=(text_of(expected[2:]),)))
    assert (row.text, row.finish_reason) == (text_of(expected[:2]), FinishReason.STOP)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_ends_the_row_and_is_no_part_of_its_text(
    open_worker: Open, include: bool
) -> None:
    expected = greedy(limit=8)
    assert expected[3] not in expected[:3]
    own = {"stop_token_ids": (expected[3],), "include_stop_str_in_output": include}
    (row,) = answers(open_worker(), prompt(**own))
    assert list(row.token_ids) == expected[:4]
    assert (row.finish_reason, row.stop_reason) == (FinishReason.STOP, expected[3])
    assert row.text == text_of(expected[: 4 if include else 3])


def test_eos_can_be_ignored_and_named(open_worker: Open) -> None:
    texts = [first + second for first, second in pairwise(LETTERS)]
    text = next(text for text in texts if EOS in greedy(text, 12)[1:])
    plain, beyond, named = answers(
        open_worker(),
        prompt(text, 0, max_tokens=12),
        prompt(text, 1, max_tokens=12, ignore_eos=True),
        prompt(text, 2, max_tokens=12, ignore_eos=True, stop_token_ids=(EOS,)),
    )
    assert plain.token_ids[-1] == named.token_ids[-1] == EOS
    assert (plain.stop_reason, named.stop_reason) == (None, EOS)
    assert len(beyond.token_ids) == 12
    assert beyond.token_ids[: len(plain.token_ids)] == plain.token_ids


# -- samples and seeds


def test_samples_are_one_row_and_the_same_again(open_worker: Open) -> None:
    own = {"n": 3, "temperature": 1.5, "max_tokens": 6, "logprobs": 2}
    prompts = [prompt("HELLO", i, **own) for i in range(3)]
    rows = answers(open_worker(seed=7), *prompts)
    for row in rows:
        assert len(row.choices) == 3
        assert len({choice.token_ids for choice in row.choices}) > 1
        first = row.choices[0]
        assert (row.text, row.token_ids, row.logprobs) == (
            first.text,
            first.token_ids,
            first.logprobs,
        )
        assert row.generated_tokens == sum(len(choice.token_ids) for choice in row.choices)
        for choice in row.choices:
            assert choice.logprobs is not None
            assert tuple(token.token_id for token in choice.logprobs) == choice.token_ids
            assert {len(token.top) for token in choice.logprobs} == {2}
    assert len({row.token_ids for row in rows}) > 1
    # Another worker, other company, another attempt: the same text.
    again = open_worker(slots=1, seed=7)
    (row,) = answers(again, prompts[1], attempt=2)
    assert row.choices == rows[1].choices
    (other,) = answers(open_worker(seed=8), prompts[1])
    assert other.choices != rows[1].choices


def test_seeds() -> None:
    drawn = SamplingParams(temperature=1)
    own = replace(drawn, seed=5)
    assert sample_seed(own, 1, 2, 0) == 5
    assert sample_seed(own, 1, 2, 3) == sample_seed(own, 9, 9, 3) != 5
    seeds = [sample_seed(drawn, run, i, s) for run in range(3) for i in range(3) for s in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    # A run can be repeated with a later version too.
    assert sample_seed(drawn, 0, 0, 0) == 8462577025998501614


# -- conversations


@pytest.mark.parametrize(
    ("generation", "given", "rendered"),
    [
        ({"chat": True}, Prompt(0, "HI"), "UHIA"),
        ({"chat": True, "system": "BE"}, Prompt(0, "HI"), "SBEUHIA"),
        ({"chat": True, "chat_template": "{{ messages[0].content }}X"}, Prompt(0, "HI"), "HIX"),
        (
            {"chat": True, "chat_template": YEAR, "date": "1999-12-31T00:00:00"},
            Prompt(0, "HI"),
            "JHI",
        ),
        ({"chat": True, "add_generation_prompt": False}, Prompt(0, "HI"), "UHI"),
        ({"chat": True, "continue_final_message": True}, Prompt(0, "HI"), "UHI"),
        (
            {"chat": True},
            Prompt(0, "HI", chat=ChatOptions(continue_final_message=True)),
            "UHI",
        ),
        (
            {
                "chat": True,
                "chat_template": "{{ a }}{{ b }}{{ messages[0].content }}",
                "chat_template_kwargs": {"a": "P", "b": "Q"},
            },
            Prompt(0, "HI", chat=ChatOptions(template_kwargs={"b": "R"})),
            "PRHI",
        ),
        ({}, Prompt(0, "HI"), "HI"),
        ({}, Prompt(0, "HI", messages=({"role": "user", "content": "HI"},)), "UHIA"),
        (
            {"chat": True, "system": "BE"},
            Prompt(
                0,
                "",
                messages=({"role": "system", "content": "OWN"}, {"role": "user", "content": ""}),
            ),
            "SOWNUA",
        ),
        (
            {"chat": True, "system": "BE"},
            Prompt(0, "Q", messages=({"role": "user", "content": "Q"},)),
            "SBEUQA",
        ),
    ],
)
def test_conversations_go_through_the_template(
    open_worker: Open,
    monkeypatch: pytest.MonkeyPatch,
    generation: dict[str, object],
    given: Prompt,
    rendered: str,
) -> None:
    monkeypatch.setattr(chat, "_why_never", lambda *_: None)  # no child a template
    limit = SamplingParams(max_tokens=4)
    (row,) = answers(open_worker(sampling=limit, **generation), given)
    assert list(row.token_ids) == greedy(rendered, 4)
    assert row.prompt_tokens == len(rendered)
    assert (row.prompt, row.messages) == (given.text, given.messages)


def test_what_cannot_be_answered_is_a_row_of_its_own(open_worker: Open) -> None:
    tool = ({"role": "tool", "content": "x"},)
    rows = answers(
        open_worker(sampling=SamplingParams(max_tokens=2)),
        Prompt(0, "x", messages=tool),
        Prompt(1, ""),
        Prompt(2, "A" * (CTX_LEN + 1)),
        Prompt(3, "HELLO"),
    )
    errors = ["refuses these messages: no tools", "prompt is empty", "more than the context", None]
    for row, error in zip(rows, errors, strict=True):
        assert (row.error is None) if error is None else (error in (row.error or ""))
    assert rows[0].messages == tool
    assert list(rows[3].token_ids) == greedy(limit=2)
    bare = open_worker(tokenizer=letters(chat_template=None))
    (row,) = answers(bare, Prompt(0, "x", messages=({"role": "user", "content": "x"},)))
    assert "no chat template" in (row.error or "")


def test_a_template_that_cannot_be_used_ends_the_worker_before_its_card(
    open_worker: Open,
) -> None:
    for template, words in [
        ("{% if %}", "cannot be used: Expected"),
        ("", "no chat"),
    ]:
        with pytest.raises(UsageError, match=words):
            open_worker(tokenizer=letters(), chat=True, chat_template=template)
    bad = letters(chat_template="{% if %}")
    (row,) = answers(open_worker(tokenizer=bad), prompt(max_tokens=2))
    assert row.error is None  # nobody has asked for it


def test_a_stop_text_that_is_a_special_token_ends_the_row(open_worker: Open) -> None:
    whole = greedy()
    special = LETTERS[whole[2]]
    assert whole.index(whole[2]) == 2
    tokenizer = letters(special=special)
    (row,) = answers(open_worker(tokenizer=tokenizer), prompt(stop=(special,)))
    assert list(row.token_ids) == whole[:3]
    assert (row.text, row.stop_reason) == (text_of(whole[:2]), special)
    assert row.finish_reason is FinishReason.STOP


def test_special_tokens_are_shown_where_the_row_wants_them(open_worker: Open) -> None:
    whole = greedy()
    special = LETTERS[whole[2]]
    worker = open_worker(tokenizer=letters(special=special))
    (row,) = answers(worker, prompt(skip_special_tokens=False))
    assert row.text == text_of(row.token_ids)
    assert special in row.text
    (row,) = answers(worker, prompt(skip_special_tokens=False, stop=(text_of(whole[1:4]),)))
    assert row.text == text_of(whole[:1])
    (row,) = answers(worker, prompt())
    assert row.text == text_of(row.token_ids).replace(special, "")


def test_a_worker_has_the_tokenizer_that_the_run_began_with(
    open_worker: Open, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("one")
    text = text_parts(tmp_path)
    (tmp_path / "README.md").write_text("two")
    open_worker(folder=tmp_path, text=text)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UsageError, match=r"is not the one that the run began with \(text was"):
        open_worker(folder=tmp_path, text=text)
    with pytest.raises(UsageError, match=r'tokenizers was "0\.1" and is'):
        open_worker(folder=tmp_path, text=text_parts(tmp_path) | {"tokenizers": "0.1"})


class Stumbling(Tokenizer):
    """Falls over some texts, on the way in and on the way out."""

    def encode(self, text: str) -> list[int]:
        if text == "BOOM":
            raise OverflowError("x" * 10_000)
        return super().encode(text)

    def decode(self, ids: Sequence[int], **how: bool) -> str:
        if list(ids) == greedy("HI", 3):
            raise KeyError("no such piece")
        return super().decode(ids, **how)


def test_whatever_is_raised_over_a_row_is_its_error(open_worker: Open) -> None:
    plain = letters()
    stumbling = Stumbling(plain._backend, settings={}, eos_ids=(EOS,))
    worker = open_worker(tokenizer=stumbling, sampling=SamplingParams(max_tokens=3))
    for _ in range(2):
        rows = answers(worker, *(prompt(text, i) for i, text in enumerate(["YES", "BOOM", "HI"])))
        assert list(rows[0].token_ids) == greedy("YES", 3)
        for row, name in zip(rows[1:], ("OverflowError", "KeyError"), strict=True):
            assert str(row.error).startswith(f"{name} came up over this row: ")
            assert row.error_class is ErrorClass.REFUSED
            assert len(str(row.error)) < 300
    assert (worker.measurement().failed_rows, worker.measurement().rows) == (4, 8)


def test_what_the_model_has_no_token_for_is_refused(open_worker: Open) -> None:
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)} | {"~": VOCAB}
    backend = Backend(models.WordLevel(vocabulary, unk_token="A"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wider = Tokenizer(backend, settings={}, eos_ids=(EOS,))
    beyond, stop, well = answers(
        open_worker(tokenizer=wider),
        prompt("H~I", 0),
        prompt("HI", 1, stop_token_ids=(VOCAB - 1, VOCAB)),
        prompt("HI", 2, stop_token_ids=(VOCAB - 1,)),
    )
    assert beyond.error == (
        "The prompt has the token 61 ('~'), and the model's last one is 60: leave it out."
    )
    assert str(stop.error).startswith("stop_token_ids has the token 61")
    assert well.error is None


@pytest.mark.parametrize(
    ("ctx_len", "sampling", "words"),
    [
        (CTX_LEN, {"min_tokens": 37}, "min_tokens is 37, and behind the 5 tokens of the prompt the "
         "context has room for 36"),
        (4096, {"n": 128, "temperature": 1, "logprobs": 20}, "128 answers of up to 4092 tokens"),
    ],
)  # fmt: skip
def test_what_the_context_or_the_memory_cannot_hold_is_said(
    open_worker: Open, ctx_len: int, sampling: dict[str, object], words: str
) -> None:
    well = prompt(index=1, min_tokens=36, max_tokens=36, n=2, temperature=1, logprobs=20)
    row, well_row = answers(open_worker(ctx_len=ctx_len), prompt(**sampling), well)
    assert words in str(row.error)
    assert [len(sample.token_ids) for sample in well_row.choices] == [36, 36]


def test_a_text_of_megabytes_is_refused_by_its_beginning(open_worker: Open) -> None:
    lens: list[int] = []

    class Watched(Tokenizer):
        def encode(self, text: str) -> list[int]:
            lens.append(len(text))
            return super().encode(text)

    plain = letters()
    watched = Watched(plain._backend, settings={"chat_template": TEMPLATE}, eos_ids=(EOS,))
    worker = open_worker(tokenizer=watched)
    text = "A" * (8 * BEGINNING_CHARS)
    endless = ({"role": "user", "content": text},)
    for given in (prompt(text), Prompt(0, "", messages=endless)):
        (row,) = answers(worker, given)
        assert str(row.error).startswith(
            "Its first 131072 characters alone are too many. The prompt"
        )
    assert lens == [BEGINNING_CHARS, BEGINNING_CHARS]
    (row,) = answers(worker, prompt("A" * 1000))
    assert str(row.error).startswith("The prompt has 1000 tokens")


def test_options_of_the_template_need_a_conversation(open_worker: Open) -> None:
    asking = replace(prompt("HI"), chat=ChatOptions(template_kwargs={"x": 1}))
    (row,) = answers(open_worker(), asking)
    assert "for a conversation" in str(row.error)
    (row,) = answers(open_worker(chat=True), asking)
    assert row.error is None


# -- what goes wrong


@pytest.mark.parametrize(
    ("failure", "raised", "words"),
    [(DeviceLost("gone"), DeviceLost, "gone"), (KeyError("bug"), DeviceError, r"KeyError\('bug'")],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whoever_waits_hears_that_the_engine_failed(
    open_worker: Open,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    raised: type[Exception],
    words: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    worker = open_worker()
    monkeypatch.setattr(FormulaSession, "run", fail)
    for _ in range(2):
        with pytest.raises(raised, match=words):
            list(worker.answer([prompt()]))


def fail_in_step(monkeypatch: pytest.MonkeyPatch, number: int, failure: Exception) -> None:
    """Let one execution of the program fail."""
    run, calls = FormulaSession.run, iter(range(10**9))

    def fail_once(*args: object, **options: object) -> object:
        if next(calls) == number:
            raise failure
        return run(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FormulaSession, "run", fail_once)


def test_what_the_runtime_refuses_for_now_is_asked_for_again(
    open_worker: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = open_worker()
    fail_in_step(monkeypatch, 3, DeviceError("later", status="QS_AGAIN"))
    rows = answers(worker, prompt("HI", 0), prompt("YES", 1))
    assert [list(row.token_ids) for row in rows] == [greedy("HI"), greedy("YES")]


def test_a_card_that_fails_once_answers_the_next_shard(
    open_worker: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = open_worker()
    fail_in_step(monkeypatch, 3, DeviceError("timed out", status="QS_TIMEDOUT"))
    with pytest.raises(DeviceError, match="timed out"):
        list(worker.answer([prompt("HI", 0), prompt("YES", 1)]))
    before = worker.progress()[0]
    assert before == 3
    rows = answers(worker, prompt("HI", 0), prompt("YES", 1), attempt=2)
    assert [list(row.token_ids) for row in rows] == [greedy("HI"), greedy("YES")]
    assert worker.progress()[0] > before
    assert worker.measurement().rows == 2


def test_closing_ends_the_shards_that_wait(
    open_worker: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping, let_go = threading.Event(), threading.Event()
    run = FormulaSession.run

    def held(*args: object, **options: object) -> object:
        stepping.set()
        assert let_go.wait(120)
        return run(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FormulaSession, "run", held)
    worker = open_worker()
    with ThreadPoolExecutor() as pool:
        answering = [
            pool.submit(lambda i=i: list(worker.answer([Prompt(i, "BCD")]))) for i in range(3)
        ]
        assert stepping.wait(120)
        closing = pool.submit(worker.close)
        let_go.set()
        closing.result(30)
        for answer_of in answering:
            with pytest.raises(DeviceError, match="closed"):
                answer_of.result(30)
    with pytest.raises(DeviceError, match="not open"):
        list(worker.answer([Prompt(9, "BCD")]))


# -- tokens while they come, and rows that nobody wants any more


def test_tokens_are_told_while_they_come(open_worker: Open) -> None:
    worker = open_worker(sampling=SamplingParams(max_tokens=9))
    prompts = [Prompt(i, text, stream=i != 1) for i, text in enumerate(["HI", "YES", "NO"])]
    with ThreadPoolExecutor() as pool:
        told = pool.submit(lambda: [chunk for some in worker.tokens() for chunk in some])
        rows = answers(worker, *prompts)
        worker.close()
        chunks = told.result(30)
    assert {chunk.index for chunk in chunks} == {0, 2}
    for row in (rows[0], rows[2]):
        own = [chunk for chunk in chunks if chunk.index == row.index]
        assert row.text.startswith("".join(chunk.text for chunk in own))
        ids = [token_id for chunk in own for token_id in chunk.token_ids]
        assert list(row.token_ids[: len(ids)]) == ids


def test_rows_are_cancelled_in_a_slot_in_the_queue_and_on_their_way(
    open_worker: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping, let_go = threading.Event(), threading.Event()
    run = FormulaSession.run

    def held(*args: object, **options: object) -> object:
        stepping.set()
        assert let_go.wait(120)
        return run(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FormulaSession, "run", held)
    worker = open_worker(slots=1)
    begin = Answerer.begin

    def begin_and_cancel(answerer: Answerer, given: Prompt, *more: Any) -> Answer:
        if given.text == "LATE":
            worker.cancel([given.index])  # while its shard is being tokenized
        return begin(answerer, given, *more)

    monkeypatch.setattr(Answerer, "begin", begin_and_cancel)
    with ThreadPoolExecutor() as pool:
        texts = ["HI", "YES", "NO", "LATE", ""]
        prompts = [Prompt(i, text, stream=True) for i, text in enumerate(texts)]
        rows = pool.submit(answers, worker, *prompts)
        assert stepping.wait(120)
        worker.cancel([0, 2, 4, 77])  # in the slot, in the queue, refused, a stranger
        let_go.set()
        reasons = [row.finish_reason for row in rows.result(60)]
    abort = FinishReason.ABORT
    assert [reasons[i] for i in (0, 2, 3)] == [abort] * 3
    assert reasons[4] is FinishReason.ERROR
    work = worker.measurement()
    assert (work.rows, work.failed_rows) == (2, 1)
    (again,) = answers(worker, prompt("HI", 0, max_tokens=4))
    assert list(again.token_ids) == greedy("HI", 4)
