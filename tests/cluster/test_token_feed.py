"""Tokens from an actor to the driver on a real Ray: one message a step, cancel, and a death."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from fake_worker import IMPATIENT
from formula_program import EOS, VOCAB
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from qaic_ray.cluster.actors import CardActors
from qaic_ray.cluster.cluster import Cluster
from qaic_ray.contract import Specializations
from qaic_ray.dispatch.dispatcher import TokensGenerated
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.driver import Audience
from qaic_ray.runs.token_streams import TokenDelta
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.worker.worker import CardWorker, WorkerSpec

pytestmark = pytest.mark.cluster
TESTS = str(Path(__file__).parents[1])
LETTERS = [chr(ord("A") + index) for index in range(VOCAB)]


def letters() -> Tokenizer:
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="A"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, {}, (EOS,))


class FormulaCard(CardWorker):
    """A card of formulas. It dies in the step that the spec's `model` says, in its first life."""

    open_checkpoint = staticmethod(  # type: ignore[assignment]
        lambda *_, **__: SimpleNamespace(eos_ids=(EOS,), config={}, folder=Path())
    )
    load_tokenizer = staticmethod(lambda _: letters())
    open_sdk = staticmethod(lambda _: SimpleNamespace(description="formulas"))  # type: ignore[assignment]

    def open_session(self, *_: object, **__: object) -> tuple[object, ExitStack]:
        sys.path.insert(0, TESTS)  # of this actor, which gets only the class by value
        from os import _exit
        from time import sleep

        from formula_program import VOCAB as VOCAB_SIZE
        from formula_program import FormulaProgram

        last_step = -1 if self.spec.incarnation else int(self.spec.model)

        class Session(FormulaProgram):
            simulated_time = None
            vocab_size = VOCAB_SIZE

            def run(self, *args: object, **options: object) -> object:
                sleep(0.005)
                if len(self.calls) == last_step:
                    _exit(1)
                return super().run(*args, **options)  # type: ignore[arg-type]

        shapes = Specializations.build(batch_size=4, prompt_len=4, ctx_len=60, continuous=True)
        return Session(shapes), ExitStack()


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def run(
    cluster: Cluster, prompts: Sequence[Prompt], *, last_step: int = -1, **audience: object
) -> list[Row]:
    rows: list[Row] = []
    spec = WorkerSpec(name="card 0", device_ids=(0,), sdk_root="", qpc="", model=str(last_step))
    cluster.run_prompts(
        prompts,
        [spec],
        worker_class=FormulaCard,
        policy=IMPATIENT,
        audience=Audience(on_row=rows.append, **audience),  # type: ignore[arg-type]
    )
    return rows


def prompts(number: int, max_tokens: int = 40) -> list[Prompt]:
    how = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [Prompt(i, LETTERS[i] * 3, sampling=how, stream=i % 2 == 0) for i in range(number)]


def test_rows_that_are_streamed_come_in_one_message_a_step(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[TokensGenerated] = []
    told: list[TokenDelta] = []
    of_actors = CardActors._tokens

    def noted(self: CardActors, worker: str, stream: object) -> object:
        event = of_actors(self, worker, stream)  # type: ignore[arg-type]
        messages.extend([event] if isinstance(event, TokensGenerated) else [])
        return event

    monkeypatch.setattr(CardActors, "_tokens", noted)
    rows = run(cluster, prompts(4), on_tokens=told.extend)
    texts = {row.index: row.text for row in rows if row.index % 2 == 0}
    assert {i: "".join(d.text for d in told if d.index == i) for i in range(4)} == {
        **texts, 1: "", 3: ""
    }  # fmt: skip
    assert [delta.index for delta in told if delta.row] == [0, 2]
    in_message = Counter(len(message.chunks) for message in messages)
    assert set(in_message) <= {1, 2}
    assert len(messages) > 5, "nothing came before the end"
    assert len(messages) <= 43, "more than one message a step"


def test_a_slow_driver_gets_several_steps_in_a_message(cluster: Cluster) -> None:
    sizes: list[int] = []

    def slow(deltas: Sequence[TokenDelta]) -> None:
        sizes.extend(len(delta.token_ids) for delta in deltas)
        time.sleep(0.1)

    (row,) = run(cluster, prompts(1), on_tokens=slow)
    assert sum(sizes) == len(row.token_ids) == 40
    assert max(sizes) > 1


def test_a_row_is_cancelled_while_it_runs(cluster: Cluster) -> None:
    cancels: list[Callable[[Iterable[int]], None]] = []
    told: list[TokenDelta] = []

    def on_tokens(deltas: Sequence[TokenDelta]) -> None:
        told.extend(deltas)
        if sum(len(delta.token_ids) for delta in told) > 3:
            threading.Thread(target=cancels[0], args=([0],)).start()

    first, second = run(
        cluster, prompts(2, max_tokens=50), on_tokens=on_tokens, on_begin=cancels.append
    )
    assert first.finish_reason is FinishReason.ABORT
    assert second.finish_reason is FinishReason.LENGTH
    assert told[-1].finish_reason is FinishReason.ABORT


def test_a_death_loses_nothing_and_tells_nothing_twice(cluster: Cluster) -> None:
    told: list[TokenDelta] = []
    rows = run(cluster, prompts(4), last_step=20, on_tokens=told.extend)
    assert {row.attempts for row in rows} == {2}
    for row in rows[::2]:
        own = [delta for delta in told if delta.index == row.index]
        assert not any(delta.restarted for delta in own)
        assert "".join(delta.text for delta in own) == row.text
