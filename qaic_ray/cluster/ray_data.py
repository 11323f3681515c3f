"""A card as a step of a Ray Data pipeline: columns of prompts in, columns of answers added.

    dataset.map_batches(
        CardPredictor,
        fn_constructor_kwargs={"model": "LLM360/AmberChat", "qpc": "/data/qpc/AmberChat-kv-..."},
        batch_size=64,
        concurrency=8,
        resources={"QAIC": 1},
    )

Called by hand it needs no Ray. It has no journal and no report, and a card that hangs is not
replaced; `qaic-ray run` has these.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qaic_ray.cards.inventory import CARD_RESOURCE, cards_name
from qaic_ray.cards.lease import CardLocks, Part, card_scope, held_cards
from qaic_ray.errors import DeviceBusy, DeviceError, RowError, UsageError
from qaic_ray.files.documents import checked
from qaic_ray.formats.row_fields import ALIASES, NESTED, is_known, mistake
from qaic_ray.formats.row_reader import Draft, OwnFields
from qaic_ray.options import EmulatorOptions, Generation
from qaic_ray.rows import ErrorClass, Prompt, Row
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sdk import Sdk, find_sdk
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts, tries
from qaic_ray.worker.text import mixed_seed
from qaic_ray.worker.turns import Turns
from qaic_ray.worker.worker import CardWorker, WorkerInfo, WorkerSpec

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy
    from ray.data import Dataset as Dataset

Batch = dict[str, NDArray[Any]]
"""Columns of one length, as Ray Data's "numpy" batches have them."""

MAX_ATTEMPTS = 3
"""For a row on whose way a card fails: once with its batch, then alone on a card opened anew."""


_COLUMNS: Mapping[str, tuple[type, Callable[[Row], Any]]] = {
    "text": (object, lambda row: row.text),
    "token_ids": (object, lambda row: list(row.token_ids)),
    "finish_reason": (object, lambda row: row.finish_reason.value),
    "stop_reason": (object, lambda row: "" if row.stop_reason is None else str(row.stop_reason)),
    "prompt_tokens": (np.int64, lambda row: row.prompt_tokens),
    "generated_tokens": (np.int64, lambda row: row.generated_tokens),
    "ttft_s": (np.float64, lambda row: row.ttft_s),
    "decode_s": (np.float64, lambda row: row.decode_s),
    "worker": (object, lambda row: row.worker),
    "attempts": (np.int64, lambda row: row.attempts),
    "error": (object, lambda row: row.error or ""),
    "logprobs": (object, lambda row: [token.logprob for token in row.logprobs or ()]),
    "choices": (
        object,
        lambda row: [choice.text for choice in row.choices or ([row] if row.ok else [])],
    ),
}
"""The columns of answers. Nothing is null, so that a column has one type in every block."""


@dataclass(frozen=True)
class Grant:
    """The cards of its node that Ray has given to this process.

    `share` is how many cards, or which part of one; `units` are their numbers on the node, where
    the cluster chooses them (`custom_unit_instance_resources`).
    """

    share: float = 1.0
    units: tuple[int, ...] = ()


class CardPredictor(AbstractContextManager["CardPredictor"]):
    """Answers batches of prompts on one card, a part of one, or a device group.

    How much of which card follows from what Ray gave to the process: `resources={"QAIC": 1}` is a
    card, 0.5 half of the NSPs of one, 4 a device group. Where Ray does not choose, it is the first
    of the node that is free.

    Args:
        model: the checkpoint: folder, hub id or .gguf file; its tokenizer is read.
        qpc: the folder of a compiled variant; at this path on every node.
        sdk: auto, real, emulated, an SDK folder, or one that is open.
        device_ids: cards to choose from; None for all of the node.
        sampling: fields of `SamplingParams` for rows that say nothing else, `max_tokens` among
            them. Columns of these names, or of other programs' for them, are the rows' own. Rows
            without a seed get one from their prompt: the same text whatever the batch and the card.
        prompt_column: the name of the prompts' column.
        prefix: what to put before the names of the answers' columns.
        generation: other options of `Generation`: chat, system, max_stall_s, ...

    Raises:
        UsageError: for a QPC, SDK or model that does not fit.
        DeviceError: where no card can be opened.
    """

    timeouts: ClassVar[Timeouts] = DEFAULT_TIMEOUTS
    """`choose_s`, and those of the card and its worker, are used; a subclass may have others."""
    worker_class: ClassVar[type[CardWorker]] = CardWorker
    metrics: ClassVar[bool] = True
    """Whether an actor exports what it does through Ray."""

    def __init__(
        self,
        model: str,
        qpc: str,
        *,
        sdk: str | Sdk = "auto",
        device_ids: Sequence[int] | None = None,
        sampling: Mapping[str, Any] | None = None,
        prompt_column: str = "prompt",
        prefix: str = "",
        **generation: Any,
    ) -> None:
        try:
            self._sampling = SamplingParams().updated(sampling or {})
        except RowError as error:
            raise UsageError(str(error)) from error
        self._prompt_column, self._prefix = prompt_column, prefix
        self._read_row = OwnFields(self._sampling).read_row
        self._sdk = sdk if isinstance(sdk, Sdk) else find_sdk(sdk, EmulatorOptions())
        self._device_ids = device_ids
        self._spec = WorkerSpec(
            name="card",
            device_ids=(),
            sdk_root=str(self._sdk.root),
            qpc=str(Path(qpc).expanduser().absolute()),
            model=model,
            generation=checked(
                Generation, {"sampling": self._sampling, **generation}, "CardPredictor"
            ),
            timeouts=self.timeouts,
        )
        self._failure = ""
        self._held = ExitStack()
        self._lock, self._turns = threading.RLock(), Turns()
        self._num_asked = 0
        self._worker: CardWorker | None = None
        self.info: WorkerInfo
        self._opened()
        if _is_actor():
            from qaic_ray.cluster.actor_process import die_with_parent

            die_with_parent(self.close, self.timeouts)

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, batch: Batch) -> Batch:
        """Answer a batch.

        Args:
            batch: a column of prompts, or one of `messages`; others may name sampling fields.

        Returns:
            Its columns, and beside them text, token_ids, finish_reason, stop_reason, prompt_tokens,
            generated_tokens, ttft_s, decode_s, worker, attempts and error; with `logprobs` or `n`
            in the constructor's sampling, or a column that asks for them, also logprobs or
            choices. A row that cannot be answered
            has finish_reason "error" and says why in error.

        Raises:
            UsageError: for columns that no row could be answered with.
            DeviceError: where the card failed, and no card could be opened in its place.
        """
        self._check_columns(batch)
        rows = self.answer(list(self._documents(batch)))
        columns = ((name, *_COLUMNS[name]) for name in self._names(batch, rows))
        return batch | {
            self._prefix + name: np.fromiter(map(value, rows), dtype, len(rows))
            for name, dtype, value in columns
        }

    def answer(self, documents: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Answer rows that have `prompt` or `messages`, and perhaps sampling fields.

        Several threads may ask at once: their rows share the card's slots.

        Returns:
            A row for each document, in their order.

        Raises:
            DeviceError: where the card failed, and no card could be opened in its place.
        """
        with self._lock:  # the worker knows rows by their numbers
            first = self._num_asked
            self._num_asked += len(documents)
        items = [
            Draft(number, "").read(self._prompt, document)
            for number, document in enumerate(documents, first)
        ]
        done = {item.index: item for item in items if isinstance(item, Row)}
        prompts = [item for item in items if isinstance(item, Prompt)]
        try:
            self._answer(prompts, done)
        except BaseException:
            self.close()
            raise
        return [done[index] for index in sorted(done)]

    def close(self) -> None:
        """Give the card back."""
        with self._lock:
            self._worker = None
            self._held.close()

    # -- the card

    def _opened(self) -> CardWorker:
        """The worker, on a card that is opened where none is."""
        with self._lock:
            return self._worker or self._open()

    def _open_anew(self, failed: CardWorker, error: DeviceError) -> None:
        """Open a card in the place of one that failed, unless another thread did."""
        with self._lock:
            if self._worker is failed:
                self._failure = str(error)
                self.close()
                self._spec = replace(self._spec, incarnation=self._spec.incarnation + 1)
            self._opened()

    def _open(self) -> CardWorker:
        busy: DeviceError | None = None
        for _ in tries(self.timeouts.choose_s, self.timeouts.poll_s):
            busy = None
            for device_ids, part in places(self._sdk, granted(), self._device_ids):
                try:
                    return self._open_on(device_ids, part)
                except DeviceError as error:
                    busy = error
        raise busy or DeviceError("There is no card here that is ready.")

    def _open_on(self, device_ids: tuple[int, ...], part: Part | None) -> CardWorker:
        scope = card_scope(self._sdk)
        name = f"{cards_name(device_ids)}{f' {part}' if part else ''}"
        spec = replace(self._spec, name=name, device_ids=device_ids, part=part)
        with ExitStack() as held:
            # Claimed among predictors first: a worker would wait for a card that another one opens.
            claim_scope = "-".join(filter(None, (scope, "claim")))
            claim = CardLocks(device_ids, part=part, scope=claim_scope, what="CardPredictor")
            claim.acquire()
            held.callback(claim.release)
            holders = held_cards(scope) if part is None else {}
            for device_id in device_ids:
                if device_id in holders:
                    raise DeviceBusy(f"Card {device_id} is in use: {holders[device_id][0]}.")
            worker = self.worker_class(spec)
            held.callback(worker.close)
            if self.metrics and _is_actor():
                from qaic_ray.cluster.monitoring.ray_metrics import record_worker

                held.enter_context(record_worker(worker))
            self.info = worker.open()
            self._worker, self._held = worker, held.pop_all()
        return worker

    # -- prompts in

    def _check_columns(self, batch: Batch) -> None:
        there = ", ".join(batch) or "none"
        if not {self._prompt_column, "messages"} & batch.keys():
            raise UsageError(
                f'There is no column "{self._prompt_column}" and no "messages" (there are: '
                f"{there}): name the prompts' by prompt_column."
            )
        taken = {self._prefix + name for name in self._names(batch)} & batch.keys()
        if taken:
            raise UsageError(
                f"The batch has columns of the names of the answers' ({', '.join(sorted(taken))}): "
                "give theirs a prefix."
            )
        for error in filter(None, map(mistake, batch)):
            raise UsageError(error)

    def _documents(self, batch: Batch) -> Iterator[dict[str, Any]]:
        read = {name: name for name in batch if name == "messages" or is_known(name)}
        if self._prompt_column in batch:
            read[self._prompt_column] = "prompt"
        for index in range(len(batch[next(reversed(read))])):
            yield {name: plain(batch[column][index]) for column, name in read.items()}

    def _prompt(self, draft: Draft, document: Mapping[str, Any]) -> Prompt:
        prompt = self._read_row(draft, document)
        params = prompt.sampling or self._sampling
        if params.is_greedy or params.seed is not None:
            return prompt
        seed = mixed_seed(prompt.text, prompt.messages)
        return replace(prompt, sampling=replace(params, seed=seed))

    # -- answers out

    def _names(self, batch: Batch, rows: Sequence[Row] = ()) -> list[str]:
        """The columns of answers. Some depend on the batch's columns, which are the same in every
        block of a dataset, and on what rows have nevertheless."""
        names = {ALIASES.get(column, column) for column in batch}
        asked = {
            "logprobs": self._sampling.logprobs is not None
            or names & {"logprobs", "top_logprobs", *NESTED}
            or any(row.logprobs is not None for row in rows),
            "choices": self._sampling.n > 1
            or names & {"n", *NESTED}
            or any(row.choices for row in rows),
        }
        return [name for name in _COLUMNS if asked.get(name, True)]

    def _answer(self, prompts: Sequence[Prompt], done: dict[int, Row]) -> None:
        shards = [prompts]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            for shard in shards:
                # Tried again alone, it is known whose fault it is that the card fails.
                with self._turns.turn(alone=attempt > 1):
                    worker = self._opened()
                    try:
                        for rows in worker.answer(shard, attempt):
                            done.update((row.index, row) for row in rows)
                    except DeviceError as error:
                        self._open_anew(worker, error)
            shards = [[prompt] for prompt in prompts if prompt.index not in done]
        for (prompt,) in shards:
            done[prompt.index] = Row.failed(
                prompt,
                f"The card failed on it every time: {self._failure}",
                worker=self.info.name,
                attempts=MAX_ATTEMPTS,
                error_class=ErrorClass.DEVICE,
            )


def places(
    sdk: Sdk, grant: Grant, device_ids: Sequence[int] | None = None
) -> list[tuple[tuple[int, ...], Part | None]]:
    """Cards that a predictor may open, best first, and which part where it is to have one."""
    qids = sorted(device.qid for device in sdk.devices() if device.ready)
    ids = [qid for qid in qids if device_ids is None or qid in device_ids]
    found: list[tuple[tuple[int, ...], Part | None]]
    if grant.share < 1:
        count = round(1 / grant.share)
        parts = [Part(number, count) for number in range(1, count + 1)]
        found = [((qid,), part) for qid in ids for part in parts]
    else:
        size = int(grant.share)
        found = [(tuple(ids[at : at + size]), None) for at in range(0, len(ids) - size + 1, size)]
    chosen = {qids[unit] for unit in grant.units if unit < len(qids)}
    return sorted(found, key=lambda place: chosen.isdisjoint(place[0]))  # a stable sort


def actor_pool(least: int, most: int, tasks_in_flight: int | None = None) -> ActorPoolStrategy:
    """Actors for a step of a pipeline; as many as may be are fixed where both numbers are one."""
    from ray.data import ActorPoolStrategy

    size: dict[str, int] = (
        {"size": most} if least == most else {"min_size": least, "max_size": most}
    )
    return ActorPoolStrategy(**size, max_tasks_in_flight_per_actor=tasks_in_flight)


def granted() -> Grant:
    """The cards that Ray gave to this process; one whole card if it is no Ray actor."""
    if not _is_actor():
        return Grant()
    import ray

    from qaic_ray.cluster.actor_process import card_units, chooses_units

    share = ray.get_runtime_context().get_assigned_resources().get(CARD_RESOURCE, 1.0)
    return Grant(share, card_units() if chooses_units() else ())


def _is_actor() -> bool:
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().get_actor_id())


def plain(value: Any) -> Any:
    """A value of a column as JSON has it; NaN is how a table has a number that is missing."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        return None if math.isnan(value) else int(value)
    return value
