"""The server's log on stderr: a line a request, of text or of JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

NAME = "qaic_ray.serve"


@dataclass
class RequestRecord:
    """One request, as its line in the log tells it.

    Attributes:
        request_id: the client's, or one that is made.
        holder: whose key it came with; empty without keys.
        prompt_tokens, answer_tokens: of its prompts and answers, as far as they are there.
    """

    request_id: str
    method: str
    path: str
    holder: str = ""
    status: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    answer_tokens: int = 0


class _TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, object] = {
            "at": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        request = getattr(record, "request", None)
        line |= {"message": record.getMessage()} if request is None else asdict(request)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr() -> None:
    """Write the server's log to stderr from now on, in a process that does nothing else."""
    log = logging.getLogger(NAME)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_TextLines())
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


@contextmanager
def logging_to_stderr(*, as_json: bool) -> Iterator[None]:
    """Write the server's log to stderr for the block."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else _TextLines())
    log = logging.getLogger(NAME)
    before = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before
