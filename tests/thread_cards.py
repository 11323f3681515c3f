"""Whole workers as the cards of a fleet, in threads of this process: no Ray, and no card either.

Each worker is what a card's actor is made of (tokenizer, engine, streams), on a program whose
answers follow from a formula. So a served request has the very text that `text_of` says.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from byte_tokens import byte_tokenizer
from formula_program import FormulaProgram, logits_of

from qaic_ray.contract import Specialization, Specializations
from qaic_ray.dispatch.dispatcher import (
    Event,
    RowsFinished,
    RunShard,
    ShardFailed,
    ShardFinished,
    TokensGenerated,
    WorkerLost,
    WorkerReady,
)
from qaic_ray.errors import QaicRayError
from qaic_ray.fleet.open_fleet import OpenFleet
from qaic_ray.metrics import Measurement
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation, ServeOptions
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.runs.open_input import OpenInput
from qaic_ray.runs.result import FleetResult
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.serve.http.keys import ApiKeys
from qaic_ray.serve.http.service import Service
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.tools.calling import support_of
from qaic_ray.worker.prompt_encoder import PromptEncoder
from qaic_ray.worker.worker import CardWorker, WorkerInfo, WorkerSpec

SPECIAL = ("<end>", "<|im_start|>", "<|im_end|>")
EOS = 256
VOCAB = 256 + len(SPECIAL)
MODEL = "formula"
CTX_LEN = 512
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    '</tools> answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n'
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer() -> Tokenizer:
    """A token a byte, and a template of conversations with tools."""
    return Tokenizer(byte_tokenizer(*SPECIAL), {"chat_template": TEMPLATE}, (EOS,))


def greedy_ids(prompt_ids: Sequence[int], limit: int) -> list[int]:
    """The tokens that a greedy row gets, whatever runs beside it; an end token is the last."""
    ids, made = list(prompt_ids), []
    while len(made) < limit and EOS not in made:
        made.append(int(logits_of(tuple(ids), VOCAB).argmax()))
        ids.append(made[-1])
    return made


def text_of(prompt: str | Sequence[int], limit: int) -> str:
    """The text of these."""
    prompt_ids = tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
    return tokenizer().decode([one for one in greedy_ids(prompt_ids, limit) if one != EOS])


class FormulaSession(FormulaProgram):
    """A program on a card that takes `step_s` for each step."""

    simulated_time = None
    vocab_size = VOCAB
    step_s = 0.0

    def run(
        self,
        shape: Specialization,
        inputs: Mapping[str, Any],
        meanwhile: Callable[[], None] | None = None,
    ) -> Any:
        if self.step_s:
            time.sleep(self.step_s)
        self.calls.clear()  # an open fleet makes any number of them
        return super().run(shape, inputs, meanwhile)

    def close(self) -> None:
        """Nothing is held."""


def formula_worker(
    number: int, *, slots: int, step_s: float = 0.0, ctx_len: int = CTX_LEN
) -> CardWorker:
    """A worker that is not open yet."""
    shapes = Specializations.build(
        batch_size=slots, prompt_len=32, ctx_len=ctx_len, continuous=True
    )

    def opened(*_: object, **__: object) -> tuple[FormulaSession, ExitStack]:
        session = FormulaSession(shapes, vocab=VOCAB)
        session.step_s = step_s
        return session, ExitStack()

    class FormulaWorker(CardWorker):
        open_checkpoint = staticmethod(  # type: ignore[assignment]
            lambda *_, **__: SimpleNamespace(eos_ids=(EOS,), config={}, folder=Path())
        )
        load_tokenizer = staticmethod(lambda _: tokenizer())
        open_sdk = staticmethod(lambda _: SimpleNamespace(description="formulas"))  # type: ignore[assignment]
        open_session = staticmethod(opened)  # type: ignore[assignment]

    spec = WorkerSpec(
        name=f"card {number}",
        device_ids=(number,),
        sdk_root="",
        qpc="",
        model="",
    )
    return FormulaWorker(spec)


class ThreadCards:
    """The driver's `Cards`, over workers of this process.

    Args:
        make: makes a worker, not open, for each life of each card.
        num_cards: how many.
    """

    def __init__(self, make: Callable[[int], CardWorker], num_cards: int) -> None:
        self.names = tuple(f"card {number}" for number in range(num_cards))
        self._make = make
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.workers: dict[str, CardWorker] = {}
        self._infos: dict[str, WorkerInfo] = {}
        self._lives = dict.fromkeys(self.names, 0)
        for name in self.names:
            self._open(name)

    def _open(self, name: str) -> None:
        worker = self.workers[name] = self._make(self.names.index(name))
        self._infos[name] = worker.open()
        life = self._lives[name]
        self._tell(name, life, WorkerReady(name, self._infos[name].slots, life))
        threading.Thread(target=self._tokens, args=(name, life, worker), daemon=True).start()

    def _tell(self, name: str, life: int, event: Event) -> None:
        if self._lives[name] == life:
            self._events.put(event)

    def _tokens(self, name: str, life: int, worker: CardWorker) -> None:
        for chunks in worker.tokens():
            self._tell(name, life, TokensGenerated(name, tuple(chunks)))

    def _answer(self, life: int, worker: CardWorker, shard: RunShard) -> None:
        try:
            for rows in worker.answer(shard.prompts, shard.attempt):
                finished = RowsFinished(shard.worker, shard.shard_id, tuple(rows))
                self._tell(shard.worker, life, finished)
        except QaicRayError as error:
            failed = ShardFailed(shard.worker, shard.shard_id, str(error), error.retryable)
            self._tell(shard.worker, life, failed)
        else:
            self._tell(shard.worker, life, ShardFinished(shard.worker, shard.shard_id))

    # -- what the driver asks

    def wait(self, timeout_s: float | None) -> Event | None:
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def wake(self) -> None:
        self._events.put(None)

    def run(self, shard: RunShard) -> None:
        worker, life = self.workers[shard.worker], self._lives[shard.worker]
        threading.Thread(target=self._answer, args=(life, worker, shard), daemon=True).start()

    def cancel(self, worker: str, indexes: Sequence[int]) -> None:
        if worker in self.workers:
            self.workers[worker].cancel(indexes)

    def retire(self, worker: str) -> None:
        self._lives[worker] += 1
        if (old := self.workers.pop(worker, None)) is not None:
            old.close()

    def replace(self, worker: str, incarnation: int) -> None:
        self.retire(worker)
        self._lives[worker] = incarnation
        self._open(worker)

    def quarantine(self, worker: str, error: str) -> None:
        self.retire(worker)

    def info(self, worker: str) -> WorkerInfo:
        return self._infos[worker]

    def measurements(self) -> dict[str, Measurement]:
        return {name: worker.measurement() for name, worker in self.workers.items()}

    # -- what a test does

    def lose(self, worker: str) -> None:
        """A card dies now, with all that it has; nothing more is heard of it."""
        life = self._lives[worker]
        self._tell(worker, life, WorkerLost(worker, "its process died", life))

    @property
    def num_in_slots(self) -> int:
        """Rows that engines have in their slots, or that wait for one."""
        states = [worker.engine_state() for worker in list(self.workers.values())]
        return sum(state.running + state.waiting for state in states)

    def close(self) -> None:
        for name in list(self.workers):
            self.retire(name)


def model_context(**changes: Any) -> ModelContext:
    """What a server of this model reads requests with."""
    context = ModelContext(
        names=(MODEL,),
        encoder=PromptEncoder(tokenizer(), Generation()),
        ctx_len=CTX_LEN,
        vocab_size=VOCAB,
        defaults=SamplingParams(),
        tools=support_of("auto", tokenizer()),
    )
    return replace(context, **changes)


@contextmanager
def formula_fleet(
    *, num_cards: int = 1, slots: int = 4, step_s: float = 0.0, ctx_len: int = CTX_LEN
) -> Iterator[tuple[OpenFleet, ThreadCards]]:
    """An open fleet of such cards, and its cards."""
    make = functools.partial(formula_worker, slots=slots, step_s=step_s, ctx_len=ctx_len)
    cards = ThreadCards(make, num_cards)

    def drive(prompts: OpenInput, audience: Audience) -> FleetResult:
        return Driver(cards, prompts, audience).run()

    fleet = OpenFleet(drive)
    try:
        fleet.wait_ready(60.0)
        yield fleet, cards
    finally:
        fleet.close(drain=False, timeout_s=60.0)
        cards.close()


def service_of(fleet: OpenFleet, *, keys: ApiKeys | None = None, **options: Any) -> Service:
    """A service that is ready."""
    service = Service(ServeOptions(**options), (MODEL,), fleet, keys=keys)
    service.became_ready(model_context(ctx_len=fleet.workers[0].ctx_len))
    return service
