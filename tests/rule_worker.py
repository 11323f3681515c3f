"""A worker that answers by rule, in the place of one with a card, and a predictor around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from qaic_ray.cluster.ray_data import CardPredictor
from qaic_ray.errors import DeviceError
from qaic_ray.rows import FinishReason, Prompt, Row, Sample
from qaic_ray.sampling_params import TokenLogprob
from qaic_ray.sdk import Device, Sdk
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker.worker import WorkerSpec

NUM_CARDS = 4


class RuleWorker:
    """Answers a text by its reverse; "bad" is a bad row, "kill" kills the card."""

    opened: list[RuleWorker] = []  # noqa: RUF012
    broken: set[int] = set()  # noqa: RUF012

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.is_open = False
        self.asked: list[Prompt] = []

    def open(self) -> SimpleNamespace:
        if self.broken & set(self.spec.device_ids):
            raise DeviceError(f"{self.spec.name} is in error.")
        self.is_open = True
        self.opened.append(self)
        return SimpleNamespace(name=self.spec.name)

    def answer(self, prompts: Sequence[Prompt], attempt: int) -> Iterator[list[Row]]:
        for prompt in reversed(prompts):  # rows come in any order
            self.asked.append(prompt)
            if not self.is_open:
                raise DeviceError(f"{self.spec.name} was closed.")
            if prompt.text == "kill":
                raise DeviceError(f"{self.spec.name} failed.")
            if prompt.text == "bad":
                yield [Row.failed(prompt, "It is bad.", worker=self.spec.name, attempts=attempt)]
                continue
            text = prompt.text[::-1]
            ids = tuple(map(ord, text))
            made = {"token_ids": ids, "worker": self.spec.name, "attempts": attempt}
            params = prompt.sampling or self.spec.generation.sampling
            if params.logprobs is not None:
                made["logprobs"] = tuple(TokenLogprob(id_, -1.0) for id_ in ids)
            if params.n > 1:
                made["choices"] = (Sample(text, ids, FinishReason.STOP),) * params.n
            yield [Row(prompt.index, prompt.text, text, FinishReason.STOP, **made)]  # type: ignore[arg-type]

    def close(self) -> None:
        self.is_open = False


class RulePredictor(CardPredictor):
    timeouts = Timeouts(choose_s=0.0)
    worker_class = RuleWorker  # type: ignore[assignment]


def cards_only(not_ready: Sequence[int] = ()) -> Sdk:
    class CardsOnly(Sdk):
        def devices(self) -> list[Device]:
            statuses = ("Error" if qid in not_ready else "Ready" for qid in range(NUM_CARDS))
            return [Device(qid, status, "", 14, 14, 0, 0) for qid, status in enumerate(statuses)]

    return CardsOnly(Path("sdk"), "real", "1.20")
