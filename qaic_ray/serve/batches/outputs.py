"""The output and the error file of a batch, written whole from its input and its journal.

    {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}

In the error file status and body are the failure's, or `response` is null and there is an `error`.

Lines are in the order of the input. The digests of the proof are over bytes that the client has:
`inputs_sha256` over the input file, `outputs_sha256` over the output file and then the error file.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaic_ray.errors import QaicRayError
from qaic_ray.files.documents import json_text
from qaic_ray.files.folders import sha256_of
from qaic_ray.rows import Row
from qaic_ray.runs.journal import Journal, Place
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.batches.batch_record import (
    PROOF_PREFIX,
    BatchRecord,
    BatchStatus,
    BatchUsage,
    Outcome,
    RequestCounts,
)
from qaic_ray.serve.batches.file_store import PURPOSE_OUTPUT, FileStore, NewFile
from qaic_ray.serve.batches.request_lines import (
    Answering,
    LineTable,
    RequestLine,
    asked_of,
    raw_lines,
    read_line,
)

INPUTS_SHA256 = f"{PROOF_PREFIX}inputs_sha256"
OUTPUTS_SHA256 = f"{PROOF_PREFIX}outputs_sha256"
EXPIRED_CODE = "batch_expired"
_OK = 200
_log = logging.getLogger(__name__)
_LINE_BREAK = re.compile("[\x85\u2028\u2029]")  # which some readers take for an end of line
_USAGE = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))


class AnsweredRows:
    """The rows that a journal has, read when their turn comes: only their places are held.

    Args:
        journal: open.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._places: dict[int, Place] = {
            entry.row.index: entry.place for entry in journal.replay()
        }

    def of(self, indexes: Sequence[int]) -> list[Row] | None:
        """The rows of these prompts; None where one has none."""
        places = [self._places.get(index) for index in indexes]
        found = [place for place in places if place is not None]
        if len(found) < len(places):
            return None
        return [self._journal.read(place.segment, place.offset) for place in found]


@dataclass
class OutputFiles:
    """Writes a batch's two files; a file without a line is not kept."""

    record: BatchRecord
    answering: Answering
    files: tuple[NewFile, NewFile]
    num_completed: int = 0
    num_failed: int = 0
    num_left_out: int = 0
    usage: BatchUsage = field(default_factory=BatchUsage)

    def write(self, ordinal: int, line: RequestLine, rows: Sequence[Row] | None) -> None:
        """Write the line of a request; one without rows has expired, or was cancelled.

        Raises:
            QaicRayError: it has no rows, and the batch is complete.
        """
        if rows is None:
            self._unanswered(ordinal, line)
            return
        name = f"{self.record.id.partition('_')[2]}-{ordinal}"
        request_id = f"req_{name}"
        try:
            body = self._body(line, rows, name)
        except ApiError as error:
            status, document = error.status, error.document()
            response = {"status_code": status, "request_id": request_id, "body": document}
            self._failed(ordinal, line, response, None)
            return
        self._count(body.get("usage") or {})
        self.num_completed += 1
        response = {"status_code": _OK, "request_id": request_id, "body": body}
        self.files[0].write(self._text(ordinal, line, response, None))

    def _body(self, line: RequestLine, rows: Sequence[Row], name: str) -> dict[str, Any]:
        asked = asked_of(line, self.record, self.answering)
        made_at = max((row.ended_at or 0.0 for row in rows), default=0.0)
        created = int(made_at) or self.record.created_at
        try:
            return self.answering.body(asked, rows, request_id=name, created=created)
        except QaicRayError:
            raise
        except Exception as error:  # one answer that cannot be written must not cost the others
            _log.exception("Line %s of %s cannot be written.", line.number, self.record.id)
            raise ApiError(500, "The answer cannot be written: see the server's log.") from error

    def _unanswered(self, ordinal: int, line: RequestLine) -> None:
        if self.record.ending is BatchStatus.CANCELLED:
            self.num_left_out += 1
            return
        if self.record.ending is not BatchStatus.EXPIRED:
            raise QaicRayError(
                f"The journal of the batch {self.record.id} has no answer to line {line.number}: "
                "look after that disk."
            )
        message = "This request was not answered before the batch's time was over."
        self._failed(ordinal, line, None, {"code": EXPIRED_CODE, "message": message})

    def _failed(
        self,
        ordinal: int,
        line: RequestLine,
        response: Mapping[str, Any] | None,
        error: Mapping[str, Any] | None,
    ) -> None:
        self.num_failed += 1
        self.files[1].write(self._text(ordinal, line, response, error))

    def _text(
        self,
        ordinal: int,
        line: RequestLine,
        response: Mapping[str, Any] | None,
        error: Mapping[str, Any] | None,
    ) -> bytes:
        document = {
            "id": f"batch_req_{self.record.id.partition('_')[2]}-{ordinal}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
        text = _LINE_BREAK.sub(lambda found: f"\\u{ord(found[0]):04x}", json_text(document))
        # Half a surrogate pair, which JSON can say and UTF-8 cannot.
        return text.encode(errors="backslashreplace") + b"\n"

    def _count(self, usage: Mapping[str, Any]) -> None:
        read, made = (int(usage.get(name, usage.get(other, 0))) for name, other in _USAGE)
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        before = self.usage
        self.usage = BatchUsage(
            before.input_tokens + read,
            before.cached_tokens + int(details.get("cached_tokens", 0)),
            before.output_tokens + made,
        )


def write_outputs(
    record: BatchRecord,
    path: Path,
    journal: Journal,
    *,
    table: LineTable,
    answering: Answering,
    store: FileStore,
    go_on: Callable[[], None] = lambda: None,
) -> Outcome:
    """Write the files of a batch that is about to end, under the ids that it has reserved.

    It may be done again after any death: the files are the same, and take each other's place.

    Args:
        record: says how it ends.
        path: of its input.
        journal: has its rows.
        table: of the input's lines.
        answering: as its requests were answered.
        store: takes the files.
        go_on: called before each line; what it raises ends this.

    Raises:
        QaicRayError: the disk refuses, or has another input or fewer rows than the batch had.
    """
    answered = AnsweredRows(journal)
    with ExitStack() as stack:
        new = [
            stack.enter_context(
                store.begin(f"{record.id}_{what}.jsonl", PURPOSE_OUTPUT, id_=reserved)
            )
            for what, reserved in zip(("output", "error"), record.reserved, strict=True)
        ]
        files = OutputFiles(record, answering, (new[0], new[1]))
        for ordinal, (number, text) in enumerate(raw_lines(path) if table.total else ()):
            go_on()
            line = read_line(number, text, record.endpoint)
            files.write(ordinal, line, answered.of(table.prompts_of(ordinal)))
        if sha256_of(path) != record.input_sha256:
            raise QaicRayError(
                f"The input of the batch {record.id} has changed on the disk: look after it."
            )
        ids = [
            file.finish(record.output_kept_s).id if file.num_bytes else None for file in files.files
        ]
    counts = RequestCounts(table.total, files.num_completed, files.num_failed)
    return Outcome(
        counts=counts,
        usage=files.usage,
        output_file_id=ids[0],
        error_file_id=ids[1],
        proof={INPUTS_SHA256: record.input_sha256, OUTPUTS_SHA256: _sha256(store, ids)},
    )


def _sha256(store: FileStore, ids: Sequence[str | None]) -> str:
    """Of the bytes of these files, one behind the other."""
    digest = hashlib.sha256()
    for id_ in filter(None, ids):
        with store.open(id_) as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()
