# ruff: noqa: N802 - the vendor's names
"""A `qaicrt` whose card takes no time: what is left between two inferences is the host's work.

Copied as `qaicrt.py` into an SDK folder by `host_overhead.py` and `scaling.py`; knows nothing of
who calls it. A program is a folder with a `program.json`: `batch_size`, `prompt_len`, `ctx_len`,
`vocab_size`, `num_layers` and `output` (`logits` or `next_tokens`) of a continuous-batching
language model. With a `step_ms` there every inference takes so long, asleep.

Every other call returns at once. What a card would write by DMA stands in memory beforehand: in
the list door, in buffers of the runtime, which `bytes(buffer)` copies, because a QBuffer is not a
bytes; in the door of arrays, in the caller's own array, which is filled when it is first seen.

The answer of a row is the same in every step. Its logits fall by 1.6 for each natural logarithm of
a token's rank, in an order of the row's own, as those of SmolLM2-135M do: over 36 positions of an
English text the median token of rank 10, 100, 1,000 stood 3.7, 6.9, 11.1 below the first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import QAicApi_pb2

ENQUEUED_NS: list[int] = []
"""When each inference was started; `COMPLETED_NS`: when its caller heard that it was done."""
COMPLETED_NS: list[int] = []

RANK_SLOPE = 1.6


class QStatus(Enum):
    """What a call answered."""

    QS_SUCCESS = 0


class QIDList(list[int]):
    """Device ids."""


class BufferDimensionsVecRef(list[Any]):
    """`(bytes of an element, dims)` of each buffer."""


class QBuffer:
    """Bytes of one input or output, as a binding has them at the least.

    It is no bytes object and lacks the buffer protocol, so whoever wants its content gets a copy.
    """

    def __init__(self, data: Any) -> None:
        self._memory = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self.size = self._memory.nbytes

    def __bytes__(self) -> bytes:
        return self._memory.tobytes()


_NOTHING = QBuffer(b"")


class QAicProgramProperties:
    """Takes the names of every SDK."""

    dataPathTimeoutMs = 0  # noqa: N815
    SubmitRetryTimeoutMs = 0
    devMapping = ""  # noqa: N815


class Context:
    """Devices."""

    def __init__(self, qids: QIDList) -> None:
        self.qids = qids


class Qpc:
    """A program folder."""

    def __init__(self, path: str) -> None:
        self.shape: dict[str, Any] = json.loads((Path(path) / "program.json").read_text())
        batch, vocab = self.shape["batch_size"], self.shape["vocab_size"]
        logits = rows_of_logits(batch, vocab)
        tokens = logits.argmax(axis=1)
        self.result = logits if self.shape["output"] == "logits" else tokens
        self.descriptor = _descriptor(self.shape)
        self.num_bindings = len(self.descriptor.selected_set.bindings)
        self.output_index = next(
            b.index for b in self.descriptor.selected_set.bindings if b.name == self.shape["output"]
        )

    def getIoDescriptor(self) -> tuple[QStatus, bytes]:
        """The serialized `IoDesc`."""
        return QStatus.QS_SUCCESS, self.descriptor.SerializeToString()


class Program:
    """A program on a card."""

    def __init__(self, context: Context, qid: int | None, qpc: Qpc, properties: Any) -> None:
        self.qpc = qpc

    def load(self) -> QStatus:
        """Nothing to do, as for the three others."""
        return QStatus.QS_SUCCESS

    activate = deactivate = unload = load


class ExecObj:
    """The buffers of one inference."""

    def __init__(self, context: Context, program: Program) -> None:
        qpc = program.qpc
        self._result = qpc.result
        self._bytes = qpc.result.reshape(-1).view(np.uint8).data
        self._output_index = qpc.output_index
        self._step_s = qpc.shape.get("step_ms", 0.0) / 1e3
        self.started_s = 0.0
        self._filled: dict[int, Any] = {}
        self._buffers: list[QBuffer] = [_NOTHING] * qpc.num_bindings
        self._results: dict[int, QBuffer] = {}

    def setData(self, buffers: Any, dimensions: Any = None) -> QStatus:
        """One QBuffer a binding, or `(index, array)` of some of them."""
        if buffers and isinstance(buffers[0], tuple):
            for index, array in buffers:
                if index == self._output_index and id(array) not in self._filled:
                    self._fill(array)
        else:
            self._buffers = list(buffers)
        return QStatus.QS_SUCCESS

    def _fill(self, array: Any) -> None:
        self._filled[id(array)] = array  # kept, so that its id stays its own
        if array.size:
            array.reshape(-1)[:] = self._result.reshape(-1)[: array.size]

    def waitForCompletion(self) -> QStatus:
        """It is done, or will be when its time is over."""
        if self._step_s:
            time.sleep(max(0.0, self.started_s + self._step_s - time.perf_counter()))
        COMPLETED_NS.append(time.perf_counter_ns())
        return QStatus.QS_SUCCESS

    def getData(self) -> tuple[QStatus, list[QBuffer]]:
        """The buffers that were set, the output's with the answer."""
        wanted = self._buffers[self._output_index].size
        if wanted not in self._results:
            self._results[wanted] = QBuffer(self._bytes[:wanted])
        buffers = self._buffers.copy()
        buffers[self._output_index] = self._results[wanted]
        return QStatus.QS_SUCCESS, buffers


class Queue:
    """Starts inferences."""

    def __init__(self, context: Context, qid: int) -> None:
        self.qid = qid

    def enqueue(self, exec_obj: ExecObj) -> QStatus:
        """It has started."""
        exec_obj.started_s = time.perf_counter()
        ENQUEUED_NS.append(time.perf_counter_ns())
        return QStatus.QS_SUCCESS


def rows_of_logits(num_rows: int, vocab_size: int) -> Any:
    """float32 [num_rows, vocab_size], the same for the same arguments."""
    falling = (-RANK_SLOPE * np.log1p(np.arange(vocab_size))).astype(np.float32)
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(falling) for _ in range(num_rows)]) + np.float32(20)


def _descriptor(shape: dict[str, Any]) -> Any:
    batch = shape["batch_size"]
    decode = _bindings(shape, rows=batch, seq_len=1)
    prefill = _bindings(shape, rows=1, seq_len=shape["prompt_len"])
    description = QAicApi_pb2.IoDesc(program_name="instant")
    widest = (
        p if np.prod(p[2]) > np.prod(d[2]) else d for p, d in zip(prefill, decode, strict=True)
    )
    for index, (name, kind, dims, is_input) in enumerate(widest):
        description.selected_set.bindings.add(
            name=name,
            index=index,
            type=getattr(QAicApi_pb2, kind),
            dir=QAicApi_pb2.BUFFER_IO_TYPE_INPUT if is_input else QAicApi_pb2.BUFFER_IO_TYPE_OUTPUT,
            dims=dims,
            size=int(np.prod(dims))
            * {"FLOAT_16_TYPE": 2, "FLOAT_TYPE": 4, "INT64_I_TYPE": 8}[kind],
            is_partial_buf_allowed=name.startswith("past_"),
        )
    for bindings in (prefill, decode):
        entry = description.allowed_shapes.add()
        for _, kind, dims, _ in bindings:
            entry.shapes.add(type=getattr(QAicApi_pb2, kind), dims=dims)
    return description


def _bindings(
    shape: dict[str, Any], *, rows: int, seq_len: int
) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """Name, type, dims of one specialization's bindings, and whether they go in."""
    cache = (shape["batch_size"], 1, shape["ctx_len"], 64)
    past = [f"past_{kind}.{i}" for i in range(shape["num_layers"]) for kind in ("key", "value")]
    if shape["output"] == "logits":
        output = ("logits", "FLOAT_TYPE", (rows, 1, shape["vocab_size"]), False)
    else:
        output = ("next_tokens", "INT64_I_TYPE", (rows, 1, 1), False)

    def state(names: Iterable[str], *, is_input: bool) -> Any:
        return [(name, "FLOAT_16_TYPE", cache, is_input) for name in names]

    return [
        ("input_ids", "INT64_I_TYPE", (rows, seq_len), True),
        ("position_ids", "INT64_I_TYPE", (rows, seq_len), True),
        *state(past, is_input=True),
        ("batch_index", "INT64_I_TYPE", (rows, 1), True),
        output,
        *state((f"{name}_RetainedState" for name in past), is_input=False),
    ]
