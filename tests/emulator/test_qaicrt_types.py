"""The runtime's plain types: as strict as compiled ones, and over the caller's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qaic_ray.emulator.qaicrt.types import program_property_class


def test_types_are_as_strict_as_compiled_ones(qaicrt: ModuleType) -> None:
    context, qpc = qaicrt.Context(), qaicrt.Qpc("")
    program = qaicrt.Program(context, 0, qpc)
    exec_obj = qaicrt.ExecObj(context, program)
    calls: list[Callable[[], object]] = [
        lambda: qaicrt.Context([0]),
        lambda: qaicrt.QIDList(["0"]),
        lambda: qaicrt.QIDList([-1]),
        lambda: qaicrt.Qpc(Path("x")),
        lambda: qaicrt.Program(context, 0, "qpc"),
        lambda: qaicrt.Program(context, "0", qpc),
        lambda: qaicrt.Program(context, 0, qpc, qaicrt.QAicQueueProperties()),
        lambda: qaicrt.ExecObj(program, context),
        lambda: qaicrt.Queue(0, context),
        lambda: qaicrt.Queue(context, 0).enqueue(program),
        lambda: qaicrt.QBuffer("text"),
        lambda: qaicrt.QBuffer(np.zeros((4, 4))[:, ::2]),
        lambda: qaicrt.BufferDimensionsVecRef([(4, 4)]),
        lambda: qaicrt.BufferDimensionsVecRef([(4, [1.5])]),
        lambda: exec_obj.setData(b""),
        lambda: exec_obj.setData([b"", b"", b"", b""]),
        lambda: exec_obj.setData([], [(4, [1])]),
        lambda: exec_obj.setData([(0, [1.0])]),
        lambda: exec_obj.setData([(9, np.zeros(1))]),
        lambda: context.setLogLevel(1),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()


def test_properties_are_those_of_the_version(qaicrt: ModuleType) -> None:
    properties = qaicrt.QAicProgramProperties()
    properties.SubmitRetryTimeoutMs = 60_000
    properties.SubmitNumRetries = 3
    assert (properties.SubmitRetryTimeoutMs, properties.devMapping) == (60_000, "")
    with pytest.raises(AttributeError):
        properties.dataPathTimeoutMs = 1
    assert not hasattr(qaicrt.QAicProgramProperties, "dataPathTimeoutMs")
    with pytest.raises(TypeError):
        properties.devMapping = 0
    with pytest.raises(TypeError):
        properties.SubmitRetryTimeoutMs = 1.5
    newer = program_property_class((1, 22))()
    newer.dataPathTimeoutMs = 60_000
    with pytest.raises(AttributeError):
        newer.SubmitRetryTimeoutMs = 1


def test_enums_print_as_the_vendors(qaicrt: ModuleType) -> None:
    assert str(qaicrt.QStatus.QS_INVAL) == f"{qaicrt.QStatus.QS_INVAL}" == "QStatus.QS_INVAL"
    assert int(qaicrt.QStatus.QS_ERROR) == 500
    assert qaicrt.QLogLevel.QL_DEBUG != qaicrt.QLogLevel.QL_ERROR


def test_log_level_is_per_context(qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    loud, quiet = qaicrt.Context(), qaicrt.Context()
    assert loud.setLogLevel(qaicrt.QLogLevel.QL_DEBUG) == qaicrt.QStatus.QS_SUCCESS
    assert (loud.getLogLevel(), loud.objName()) == (qaicrt.QLogLevel.QL_DEBUG, "Context")
    loud.log.detail("small")
    quiet.log.detail("unseen")
    assert capfd.readouterr().err.endswith(f"[debug][Aic-{loud.getId()}]small\n")


@pytest.mark.parametrize("kind", [bytes, bytearray, np.frombuffer])
def test_a_qbuffer_is_the_memory_it_was_made_from(
    qaicrt: ModuleType, kind: Callable[[bytes], Any]
) -> None:
    source = kind(np.arange(6, dtype=np.int64).tobytes())
    buffer = qaicrt.QBuffer(source)
    assert buffer.size == 48
    assert bytes(buffer) == bytes(memoryview(buffer)) == bytes(source)
    assert np.frombuffer(buffer, np.int64).tolist() == list(range(6))
    assert np.shares_memory(buffer, np.frombuffer(source, np.uint8))
    assert bytes(qaicrt.QBuffer(b"")) == b""


def test_bytes_of_a_qbuffer_of_bytes_are_the_same_object(qaicrt: ModuleType) -> None:
    source = bytes(1000)
    assert bytes(qaicrt.QBuffer(source)) is source
    assert bytes(qaicrt.QBuffer(source)[:10]) == bytes(10)


def test_dimensions_are_read_back_as_the_recipe_reads_them(qaicrt: ModuleType) -> None:
    dims = qaicrt.BufferDimensionsVecRef([(4, [2, 3])])
    dims[0] = (8, np.array([]).shape)
    assert dims[0] == (8, [0])
    assert dims[0][1][0] == 0
    dims.append((2, (np.int64(5),)))
    assert list(dims)[1] == (2, [5])


def test_mappings_and_info_of_a_qpc(qaicrt: ModuleType) -> None:
    qpc = qaicrt.Qpc("cores=3")
    past, ids, logits, state = qpc.getBufferMappings()
    assert (past.bufferName, past.index, past.isPartialBufferAllowed) == ("past", 0, True)
    assert ids.dataType == qaicrt.QAicBufferDataTypeEnum.BUFFER_DATA_TYPE_INT64I
    assert ids.ioType == qaicrt.BufferIoTypeEnum.BUFFER_IO_TYPE_INPUT
    assert logits.ioType == state.ioType == qaicrt.BufferIoTypeEnum.BUFFER_IO_TYPE_OUTPUT
    assert (qpc.getInfo().numCores, qpc.getInfo().batchSize) == (3, 2)
