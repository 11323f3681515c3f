"""A run's input: which one it is, which of its rows are answered, and the thread that reads it.

The fingerprint is a JSON object of what must be unchanged for a run to be resumed, but for the rows
of the input; each of those has its own digest.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.options import Generation
from qaic_ray.rows import ChatOptions, Prompt, Row
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts

if TYPE_CHECKING:
    from qaic_ray.formats.frozen_file import FrozenFile

Fingerprint = Mapping[str, Any]
"""Names to JSON values, in any depth."""

INPUT = "input"

# They change the speed of answers, not their text.
_OF_NO_EFFECT = {"max_stall_s", "prefix_reuse", "drafts", "draft_qpc"}
# Options that the first journals have under other names, and options that are part of another key.
_NAMES = {"seed": "run_seed", "input_len": "prompt_len"}
_IN_PARTS = {
    "generation_len",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
}


def fingerprint(
    source: Fingerprint,
    *,
    qpc: str,
    model: Fingerprint,
    generation: Generation,
    numerics: str | None = None,
) -> Fingerprint:
    """The fingerprint of a run.

    Args:
        source: of the input: `text_source`, `file_source` or `STREAM_SOURCE`.
        qpc: the compiled program's content key.
        model: the digest of each part of the checkpoint that an answer depends on.
        generation: the run's; its seed must have been drawn.
        numerics: how emulated cards compute; None for real ones.
    """
    names = Generation.model_fields.keys() - _OF_NO_EFFECT - _IN_PARTS
    making = {_NAMES.get(name, name): getattr(generation, name) for name in names}
    making["sampling"] = asdict(generation.defaults)
    making["chat_options"] = asdict(generation.chat_options)
    whole = {INPUT: source, "qpc": qpc, "model": model, **making}
    if numerics is not None:
        whole["numerics"] = numerics
    plain: Fingerprint = json.loads(json.dumps(whole))  # as it will be when read back
    return plain


STREAM_SOURCE: Fingerprint = {"stream": True}
"""Of an input that cannot be read twice to be sure: its rows' digests are all there is."""

OPEN_SOURCE: Fingerprint = {"open": True}
"""Of an input to which prompts come at any time, in any order."""


def text_source(text: str) -> Fingerprint:
    """Of a `--prompt` argument."""
    content = text.encode(errors="surrogatepass")
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def file_source(file: FrozenFile) -> Fingerprint:
    """Of a prompts file, whatever its name is and wherever it lies."""
    return {"bytes": file.num_bytes, "sha256": file.sha256}


_NO_CONTENT = ("index", "draw", "stream", "background")


def row_digest(item: Prompt | Row) -> bytes:
    """SHA-256 of a row of the input, without its index."""
    if isinstance(item, Row):
        parts = {"unusable": True, "id": item.id, "text": item.prompt, "messages": item.messages}
    else:
        parts = {key: value for key, value in vars(item).items() if key not in _NO_CONTENT}
    # What is not set leaves no trace, so that a later version with more fields gives the same.
    parts = {key: value for key, value in parts.items() if value is not None}
    return hashlib.sha256(json.dumps(parts, default=_plain).encode()).digest()


def short_digest(item: Prompt | Row) -> int:
    """The digest of a row of the input as the journal has it; never 0."""
    return _short(row_digest(item))


def long_digest(item: Prompt | Row) -> int:
    """The digest of a row as the journal of an open input has it, in which only content tells which
    prompt a row answers: two in a billion pairs of a million prompts each are the same by chance.
    """
    return int.from_bytes(row_digest(item)[:8], "big")


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:4], "big") or 1


_DEFAULTS = vars(SamplingParams())


def _plain(value: object) -> dict[str, Any]:
    if isinstance(value, SamplingParams):
        return {key: v for key, v in vars(value).items() if v != _DEFAULTS[key]}
    if isinstance(value, StructuredOutputs):
        return value.document()
    if isinstance(value, ChatOptions):
        return vars(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"A prompt holds a {type(value).__name__}, which has no digest.")


class Intake:
    """Digests the rows of the input, and leaves out those that earlier sessions answered.

    It holds four bytes for each row that is answered.

    Attributes:
        num_rows: rows that have been read, those that were answered before included.
        sha256: over the digests of all these rows, in order.
        open: index -> short digest of each row that `unanswered` returned; whoever has the final
            row takes the digest out.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.sha256 = hashlib.sha256()
        self.open: dict[int, int] = {}
        self._done = array("I")  # index -> digest, 0 for a row that is not done

    def mark_done(self, index: int, digest: int) -> None:
        """Mark a row as answered, with the short digest that it had.

        Raises:
            QaicRayError: it is marked already.
        """
        missing = index + 1 - len(self._done)
        if missing > 0:
            self._done.frombytes(bytes(missing * self._done.itemsize))
        if self._done[index]:
            raise QaicRayError(
                f"The journal answers row {index} twice: delete one of its lines, or begin a new "
                "run."
            )
        self._done[index] = digest

    def unanswered(self, items: Iterable[Prompt | Row]) -> Iterator[Prompt | Row]:
        """Those of the input's items, from its first on, that are not done.

        Raises:
            UsageError: while reading, for a row that is not the one that was answered, and for an
                input that ends before the last of those.
        """
        for item in items:
            digest = row_digest(item)
            short = _short(digest)
            self.sha256.update(digest)
            self.num_rows += 1
            before = self._done[item.index] if item.index < len(self._done) else 0
            if not before:
                self.open[item.index] = short
                yield item
            elif before != short:
                raise UsageError(
                    f"Row {item.index} of the input (counted from 0) is not the one that this run "
                    "has answered: resume it with the input it had, or begin a new run."
                )
        if self.num_rows < len(self._done):
            raise UsageError(
                f"The input ends after {self.num_rows} rows, but this run has answered row "
                f"{len(self._done) - 1} (counted from 0): resume it with the input it had, or "
                "begin a new run."
            )


@dataclass(frozen=True)
class Batch:
    """Items of the input in their order; `exhausted`: these are the last ones.

    `error` says why the input ends with them, where that is not its end. `is_dry`: an open input
    has no more now.
    """

    items: tuple[Prompt | Row, ...]
    exhausted: bool
    error: QaicRayError | None = None
    is_dry: bool = False


class ThreadedReader:
    """Gives the input in batches; it reads in a thread of its own, no more than it is asked for.

    Attributes:
        poll_s: seconds until `poll` is to be called again, while it gives nothing.

    Args:
        items: the input; it is read in another thread than the caller's.
        clock: seconds.
        timeouts: `read_poll_s`, `read_stall_s` and `read_gather_s` are used.
    """

    def __init__(
        self,
        items: Iterable[Prompt | Row],
        *,
        clock: Callable[[], float] = time.monotonic,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self.poll_s = timeouts.read_poll_s
        self._timeouts = timeouts
        self._items: Iterator[Prompt | Row] = iter(items)
        self._clock = clock
        self._changed = threading.Condition()
        self._ready: deque[Prompt | Row] = deque()
        self._num_read = self._num_wanted = self._num_given = 0
        self._asked_s = self._newest_s = 0.0
        self._ended = self._closed = False
        self._failure: BaseException | None = None
        # A daemon: it may wait for a line that nobody ever types.
        threading.Thread(target=self._run, name="input", daemon=True).start()

    def ask(self, num_items: int) -> None:
        """Ask for so many items; what was asked for before has been given."""
        with self._changed:
            self._num_wanted = self._num_given + num_items
            self._asked_s = self._clock()
            self._changed.notify()

    def poll(self) -> Batch | None:
        """All that was asked for, or what came of a slow input; None while there is nothing.

        Raises:
            UsageError: the input is not this run's; all that was read before has been given.
        """
        is_over = self._ended  # before what is ready is looked at: nothing follows then
        now_s, timeouts = self._clock(), self._timeouts
        is_slow = self._ready and (
            now_s - self._newest_s >= timeouts.read_stall_s
            or now_s - self._asked_s >= timeouts.read_gather_s
        )
        if not (is_over or self._num_read >= self._num_wanted or is_slow):
            return None
        items = tuple(self._ready.popleft() for _ in range(len(self._ready)))
        self._num_given += len(items)
        failure = self._failure if is_over else None
        if failure is None or (
            isinstance(failure, QaicRayError) and not isinstance(failure, UsageError)
        ):
            return Batch(items, exhausted=is_over, error=failure)
        if not items:
            raise failure
        return Batch(items, exhausted=False)

    def close(self) -> None:
        """Read no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._num_read < self._num_wanted or self._may_read():
                item = next(self._items)
                self._newest_s = self._clock()
                self._ready.append(item)
                self._num_read += 1
        except StopIteration:
            pass
        except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
            self._failure = error
        self._ended = True

    def _may_read(self) -> bool:
        """Wait until more is wanted; False when nothing ever will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._num_read < self._num_wanted)
            return not self._closed
