"""The step of a processor that answers rows: a card's actor, many batches at once.

Rows are dictionaries in one column, so that no column of theirs is taken for a field by its name.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

from qaic_ray.cluster.ray_data import CardPredictor, plain
from qaic_ray.errors import RowError
from qaic_ray.rows import Row

DATA = "__data"
"""The column that has the rows, as in `ray.data.llm`; no dataset may have it."""
INFERENCE_ERROR = "__inference_error__"
"""Of a row: why it has no answer, or empty."""

_OF_A_PROMPT = ("add_generation_prompt", "chat_template_kwargs", "continue_final_message")
_NO_TEXT = ("mm_processor_kwargs", "multimodal_data")
_MAX_PROMPT_CHARS = 500  # of an error row, as in `ray.data.llm`


class CardAnswers:
    """Answers batches of rows on one card; Ray Data makes an actor of it.

    Args:
        predictor: what `CardPredictor` is made with.
        chat: whether a row's `messages` are answered, or its `prompt` as it stands.
        chat_template_kwargs: for rows that bring none.
        continue_on_error: whether a row that cannot be answered is a row too.
        num_batches: batches at once.
        metrics: whether the actor exports what it does through Ray.
    """

    predictor_class: type[CardPredictor] = CardPredictor

    def __init__(
        self,
        predictor: Mapping[str, Any],
        *,
        chat: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_on_error: bool = False,
        num_batches: int = 1,
        metrics: bool = True,
    ) -> None:
        kind = self.predictor_class if metrics else _without_metrics(self.predictor_class)
        self._predictor = kind(**predictor)
        self._chat, self._kwargs = chat, dict(chat_template_kwargs or {})
        self._continue_on_error = continue_on_error
        self._threads = ThreadPoolExecutor(num_batches)
        self._request_ids = count()

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Answer a batch; the rows come back in their order, with the answers' fields.

        Raises:
            RowError: for the first row that cannot be answered, unless errors are rows.
            DeviceError: where the card failed, and no card could be opened in its place.
        """
        rows = [dict(row) for row in batch.get(DATA, ())]
        if rows:
            loop = asyncio.get_running_loop()
            rows = await loop.run_in_executor(self._threads, self._answered, rows)
        yield {DATA: rows}

    def close(self) -> None:
        """Give the card back."""
        self._predictor.close()
        self._threads.shutdown()

    def _answered(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        documents = [self._document(row) for row in rows]
        batch_id = uuid.uuid4().hex
        answers = self._predictor.answer(documents)
        if not self._continue_on_error:
            for answer in answers:
                if not answer.ok:
                    raise RowError(
                        f"A row cannot be answered: {answer.error} With should_continue_on_error "
                        f"it would be a row with {INFERENCE_ERROR}."
                    )
        return [
            # What asked for the answer is left out, as in `ray.data.llm`.
            {name: value for name, value in row.items() if name != "sampling_params"}
            | fields_of(answer, document)
            | {"batch_uuid": batch_id, "request_id": next(self._request_ids) if answer.ok else -1}
            for row, document, answer in zip(rows, documents, answers, strict=True)
        ]

    def _document(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What of a row is asked: its conversation or prompt, and its sampling parameters."""
        names = [*_OF_A_PROMPT, "messages" if self._chat else "prompt"]
        if self._chat and row.get("messages") is None:
            names.append("prompt")
        document = {name: plain(row[name]) for name in names if row.get(name) is not None}
        if any(row.get(name) is not None for name in _NO_TEXT):
            document["images"] = True  # which is refused as in every input
        params = _without_none(plain(row.get("sampling_params") or {}))
        params.pop("detokenize", None)  # texts are always there
        document["sampling_params"] = params
        messages = document.get("messages")
        if messages:
            document.setdefault("chat_template_kwargs", self._kwargs)
            if isinstance(messages[-1], Mapping) and messages[-1].get("role") != "user":
                document.setdefault("continue_final_message", True)
                document.setdefault("add_generation_prompt", False)
        return document


def fields_of(answer: Row, document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an answer, in the names of `ray.data.llm`, and the card's.

    Args:
        answer: a row of a run.
        document: what was asked.
    """
    seconds = answer.ttft_s + answer.decode_s + (answer.queue_s or 0.0)
    # A list that is empty in a whole block would have a type of its own there.
    asked: dict[str, Any] = {}
    if answer.logprobs is not None:
        asked["logprobs"] = [token.logprob for token in answer.logprobs]
    if answer.choices:
        asked["choices"] = [choice.text for choice in answer.choices]
    return asked | {
        "prompt": answer.prompt if answer.ok else answer.prompt[:_MAX_PROMPT_CHARS],
        "num_input_tokens": answer.prompt_tokens,
        "generated_text": answer.text,
        "generated_tokens": list(answer.token_ids),
        "num_generated_tokens": answer.generated_tokens,
        "finish_reason": answer.finish_reason.value,
        "stop_reason": "" if answer.stop_reason is None else str(answer.stop_reason),
        "metrics": {"ttft_s": answer.ttft_s, "decode_s": answer.decode_s},
        "time_taken_llm": seconds if answer.ok else -1.0,
        "params": str(document["sampling_params"]) if answer.ok else "",
        "worker": answer.worker,
        INFERENCE_ERROR: "" if answer.ok else answer.error or "It was ended.",
    }


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A column of dictionaries has every key of its rows in each; absent ones are null."""
    return {name: value for name, value in fields.items() if value is not None}


def _without_metrics(kind: type[CardPredictor]) -> type[CardPredictor]:
    return type(kind.__name__, (kind,), {"metrics": False})
