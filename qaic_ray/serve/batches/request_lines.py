"""The lines of a batch's input: each checked, each a request, and which prompts are whose.

`{"custom_id", "method": "POST", "url", "body": {..}}`. What a line's form shows to be wrong fails
the batch before it begins; what only the model refuses fails that request alone.
"""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import QaicRayError, RowError
from qaic_ray.files.documents import shown
from qaic_ray.formats.json_rows import json_object
from qaic_ray.formats.lines import MAX_LINE_BYTES
from qaic_ray.formats.row_fields import check_unicode
from qaic_ray.rows import ErrorClass, Prompt, Row
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.serve.api_errors import ApiError, bad_request
from qaic_ray.serve.batches.batch_record import BatchRecord, LineError
from qaic_ray.worker.text import mixed_seed

if TYPE_CHECKING:
    from qaic_ray.runs.intake import Fingerprint
    from qaic_ray.serve.protocol.asked import Asked

MAX_ERRORS = 100
"""Bad lines that a batch names; it says how many more there are."""
MAX_ID_CHARS = 512
GIVE_WAY_S = 1e-4
"""Slept after each line: a thread that reads 50,000 of them must not hold up the event loop, which
would wait for the interpreter five milliseconds each time."""

OF_THE_MODEL = frozenset({"context_length_exceeded"})
"""Codes of errors that only the model and its QPC give: another one could answer such a request."""


@dataclass(frozen=True)
class Answering:
    """How requests are read and their answers written.

    Attributes:
        endpoints: that a batch may name.
        read: the request of an endpoint's body, read as at a Unix time in seconds, since a chat
            template may show the date; raises ApiError.
        body: the body of the answer to a request by its rows; raises ApiError.
        model: the name that batches show.
        program: what answers depend on beside the request, as in a run's fingerprint.
    """

    endpoints: tuple[str, ...]
    read: Callable[[str, Mapping[str, Any], int], Asked]
    body: Callable[..., dict[str, Any]]
    model: str
    program: Fingerprint


class BadLine(QaicRayError):
    """A line that fails the whole batch; `code` and `param` are the interface's."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True)
class RequestLine:
    """A well-formed line; `number` counts the file's lines from 1."""

    number: int
    custom_id: str
    body: Mapping[str, Any]


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, each with its number from 1."""
    with path.open("rb") as stream:
        number = 0
        while text := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if text.strip():
                yield number, text
            time.sleep(GIVE_WAY_S)


def read_line(number: int, text: bytes, endpoint: str) -> RequestLine:
    """The request of a line, its body not read yet.

    Raises:
        BadLine: it is none.
    """
    if len(text) > MAX_LINE_BYTES:
        raise BadLine("line_too_long", f"A line has at most {MAX_LINE_BYTES:,} bytes.")
    try:
        document = json_object(text.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (RowError, UnicodeDecodeError) as error:
        said = str(error) if isinstance(error, RowError) else "Not UTF-8."
        raise BadLine("invalid_json_line", said) from error
    custom_id = document.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        raise BadLine(
            "invalid_custom_id",
            f"custom_id is {shown(custom_id)}: it is a text of 1 to {MAX_ID_CHARS} characters.",
            "custom_id",
        )
    try:
        check_unicode("custom_id", custom_id)
    except RowError as error:
        raise BadLine("invalid_custom_id", str(error), "custom_id") from error
    if (method := document.get("method")) != "POST":
        raise BadLine("invalid_method", f"method is {shown(method)}: it is POST.", "method")
    if (url := document.get("url")) != endpoint:
        raise BadLine(
            "invalid_url", f"url is {shown(url)}: the batch's endpoint is {endpoint}.", "url"
        )
    body = document.get("body")
    if not isinstance(body, dict):
        raise BadLine("invalid_body", f"body is {shown(body)}: it is an object.", "body")
    if body.get("stream"):
        raise BadLine("invalid_body", "stream is true: a batch has no streams.", "body.stream")
    return RequestLine(number, custom_id, body)


def asked_of(line: RequestLine, batch: BatchRecord, answering: Answering) -> Asked:
    """What a line asks for; the same, whenever it is read.

    Raises:
        ApiError: it is refused.
    """
    try:
        asked = answering.read(batch.endpoint, line.body, batch.created_at)
    except ApiError:
        raise
    except QaicRayError as error:
        raise bad_request(str(error)) from error
    if not asked.prompts:
        raise bad_request("The request has no prompt.")
    return asked


class LineTable:
    """Which prompts, numbered over the whole batch, are whose line's.

    Args:
        total: lines that are requests.
        several: ordinal of a line (from 0, blank ones not counted) -> its prompts, where those are
            not one.
    """

    def __init__(self, total: int, several: Mapping[int, int]) -> None:
        self.total = total
        self.several = dict(several)
        widths = (self.several.get(ordinal, 1) for ordinal in range(total))
        self._starts = list(accumulate(widths, initial=0)) if self.several else None

    @property
    def num_prompts(self) -> int:
        """Prompts of all lines."""
        return self.total if self._starts is None else self._starts[-1]

    def line_of(self, index: int) -> int:
        """The ordinal of the line that has a prompt."""
        return index if self._starts is None else bisect_right(self._starts, index) - 1

    def prompts_of(self, ordinal: int) -> range:
        """The numbers of a line's prompts."""
        if self._starts is None:
            return range(ordinal, ordinal + 1)
        return range(self._starts[ordinal], self._starts[ordinal + 1])


@dataclass(frozen=True)
class CheckedInput:
    """What came of reading an input: its lines, or what is wrong with some of them."""

    table: LineTable
    errors: tuple[LineError, ...]


def check_input(
    path: Path,
    batch: BatchRecord,
    answering: Answering,
    *,
    max_lines: int,
    is_wanted: Callable[[], bool] = lambda: True,
) -> CheckedInput:
    """Read every line of an input.

    Args:
        path: of the file.
        batch: whose it is.
        answering: reads the bodies of requests.
        max_lines: that a batch may have.
        is_wanted: asked after each line; when it is not, the rest is not read.
    """
    errors: list[LineError] = []
    ids: dict[bytes, int] = {}
    several: dict[int, int] = {}
    total = num_bad = 0
    for number, text in raw_lines(path):
        if not is_wanted():
            break
        try:
            line = read_line(number, text, batch.endpoint)
            num_prompts = _check_line(line, ids, batch, answering)
        except BadLine as error:
            num_bad += 1
            if num_bad <= MAX_ERRORS:
                errors.append(LineError(error.code, str(error), number, error.param))
            continue
        if num_prompts != 1:
            several[total] = num_prompts
        total += 1
    if num_bad > MAX_ERRORS:
        said = f"{num_bad - MAX_ERRORS:,} more lines are wrong."
        errors.append(LineError("too_many_errors", said))
    if not total and not num_bad:
        errors.append(LineError("empty_file", "The file has no request."))
    if total > max_lines:
        said = f"The file has {total:,} requests: a batch has up to {max_lines:,}."
        errors.append(LineError("too_many_requests", said))
    return CheckedInput(LineTable(total, several), tuple(errors))


def _check_line(
    line: RequestLine, ids: dict[bytes, int], batch: BatchRecord, answering: Answering
) -> int:
    """The number of a line's prompts.

    Raises:
        BadLine: it fails the batch.
    """
    key = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
    earlier = ids.setdefault(key, line.number)
    if earlier != line.number:
        raise BadLine(
            "duplicate_custom_id",
            f"custom_id is {shown(line.custom_id)}, and so is that of line {earlier}: give each "
            "its own.",
            "custom_id",
        )
    try:
        return len(asked_of(line, batch, answering).prompts)
    except ApiError as error:
        if error.code in OF_THE_MODEL:
            return 1
        param = None if error.param is None else f"body.{error.param}"
        raise BadLine(error.code or "invalid_request", str(error), param) from error


def prompts_of_input(
    path: Path, batch: BatchRecord, answering: Answering, table: LineTable
) -> Iterator[Prompt | Row]:
    """The prompts of an input that was checked, numbered over the whole batch.

    A prompt that has no seed gets one of its batch and its place there, so that it has the same
    answer whenever and however often it is run. A request that the model refuses is an error row.

    Raises:
        QaicRayError: while reading, for an input that is not read as it was when it was checked.
    """
    for ordinal, (number, text) in enumerate(raw_lines(path)):
        line = read_line(number, text, batch.endpoint)
        indexes = table.prompts_of(ordinal)
        try:
            prompts = asked_of(line, batch, answering).prompts
        except ApiError as error:
            if len(indexes) != 1:
                raise _read_otherwise(number) from error
            refused = Prompt(indexes[0], "", id=line.custom_id)
            yield Row.failed(refused, str(error), error_class=ErrorClass.REFUSED)
            continue
        if len(prompts) != len(indexes):
            raise _read_otherwise(number)
        for index, prompt in zip(indexes, prompts, strict=True):
            params = prompt.sampling or SamplingParams()
            if params.seed is None:
                params = replace(params, seed=mixed_seed("batch", batch.id, index))
            yield replace(prompt, index=index, id=line.custom_id, sampling=params)


def _read_otherwise(number: int) -> QaicRayError:
    return QaicRayError(
        f"Line {number} of the input is read otherwise than when the batch was made: start the "
        "server's earlier version again, or cancel the batch."
    )
