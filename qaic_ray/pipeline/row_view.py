"""One row of a run: what the journal has of it, and its prompt rendered as the run rendered it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.pipeline.looking import known_run
from qaic_ray.pipeline.request import RunRequest, read_request
from qaic_ray.runs.run_input import STDIN

if TYPE_CHECKING:
    from qaic_ray.inspect.row_history import RowRecord
    from qaic_ray.rows import Prompt, Row


@dataclass(frozen=True)
class Rendering:
    """The text that the model was given for a row, and its token ids.

    Attributes:
        text: what the template made of the prompt; None where it cannot be made again.
        remark: why it cannot, or may not be what the model was given.
    """

    text: str | None = None
    token_ids: tuple[int, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class RowView:
    """A row of a run: all that the journal has of it, and the prompt as it was rendered."""

    folder: Path
    records: Sequence[RowRecord]
    rendering: Rendering

    @property
    def row(self) -> Row:
        """As its last session ended it."""
        return self.records[-1].row

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "folder": str(self.folder.absolute()),
            "row": self.row.to_json(),
            "rendered_prompt": self.rendering.text,
            "prompt_token_ids": list(self.rendering.token_ids),
            "remark": self.rendering.remark,
            "history": [
                {
                    "session": record.session,
                    "at_s": record.at_s,
                    "is_final": record.is_final,
                    "worker": record.row.worker,
                    "attempts": record.row.attempts,
                    "finish_reason": record.row.finish_reason.value,
                    "error": record.row.error,
                }
                for record in self.records
            ],
        }


def show_row(run: str, which: str, output: Path) -> RowView:
    """A row of a run.

    Args:
        run: names the run; see `known_run`.
        which: the row's index, or its id.
        output: the folder of runs.

    Raises:
        UsageError: there is no such run, or no such row in its journal.
    """
    from qaic_ray.inspect.row_history import row_history

    folder = known_run(run, output)
    records = row_history(folder, which)
    try:
        rendering = _rendered(read_request(folder), records[-1])
    except (QaicRayError, OSError) as error:
        rendering = Rendering(remark=f"The prompt cannot be rendered again: {error}")
    return RowView(folder, records, rendering)


def _rendered(request: RunRequest, record: RowRecord) -> Rendering:
    """The row's prompt through the tokenizer and template that the request names.

    Raises:
        QaicRayError: it cannot be done; one sentence.
    """
    from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
    from qaic_ray.worker.prompt_encoder import PromptEncoder

    row, remarks = record.row, []
    prompt, is_whole = _prompt(request, record)
    if not is_whole:
        remarks.append(
            "The input is gone or has changed: chat options of the row's own are unknown."
        )
    tokenizer = load_tokenizer(open_checkpoint(request.model, weights=False))
    encoder = PromptEncoder(tokenizer, request.generation)
    text, token_ids = encoder.text(prompt), tuple(encoder.ids(prompt))
    if row.prompt_tokens and row.prompt_tokens != len(token_ids):
        remarks.append(
            f"The model was given {row.prompt_tokens} tokens, and these are {len(token_ids)}: its "
            "tokenizer or template has changed."
        )
    return Rendering(text, token_ids, " ".join(remarks))


def _prompt(request: RunRequest, record: RowRecord) -> tuple[Prompt, bool]:
    """The row's prompt, from the input if that still has it; and whether that is so."""
    from qaic_ray.rows import Prompt

    row = record.row
    for prompt in _of_input(request, record):
        return prompt, True
    return Prompt(row.index, row.prompt, row.id, row.messages), False


def _of_input(request: RunRequest, record: RowRecord) -> Iterator[Prompt]:
    from qaic_ray.rows import Prompt
    from qaic_ray.runs.intake import short_digest

    if request.run.prompts == STDIN:
        return
    try:
        for item in replace(request, new_input=False).open_input().prompts:
            if item.index == record.row.index:
                if isinstance(item, Prompt) and short_digest(item) == record.digest:
                    yield item
                return
    except (UsageError, OSError):
        return
