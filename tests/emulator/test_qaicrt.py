"""The runtime's doors, over a fake program: the vendor's call sequences, statuses and errors."""

from __future__ import annotations

import json
import re
import threading
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from qaic_ray.emulator.card import Demand, Machine
from qaic_ray.emulator.container import aicapi


class RecipeSession:
    """The call sequence of the published recipe's session, and of QEfficient's."""

    def __init__(self, rt: ModuleType, path: str, qids: list[int], dev: int | None = None) -> None:
        self.rt = rt
        self.context = rt.Context(rt.QIDList(qids))
        self.queue = rt.Queue(self.context, qids[0])
        qpc = rt.Qpc(path)
        status, data = qpc.getIoDescriptor()
        assert status == rt.QStatus.QS_SUCCESS
        iodesc = aicapi.IoDesc()
        iodesc.ParseFromString(bytes(data))
        self.bindings = iodesc.selected_set.bindings
        self.index = {binding.name: binding.index for binding in self.bindings}
        properties = rt.QAicProgramProperties()
        properties.SubmitRetryTimeoutMs = 60_000
        if len(qids) > 1:
            properties.devMapping = ":".join(map(str, qids))
        self.program = rt.Program(self.context, dev, qpc, properties)
        assert self.program.load() == rt.QStatus.QS_SUCCESS
        self.program.activate()
        self.exec_obj = rt.ExecObj(self.context, self.program)
        self.buffers = [rt.QBuffer(bytes(binding.size)) for binding in self.bindings]
        itemsize = {aicapi.FLOAT_TYPE: 4, aicapi.INT64_I_TYPE: 8}
        self.dims = rt.BufferDimensionsVecRef(
            [(itemsize[b.type], list(b.dims)) for b in self.bindings]
        )

    def set(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self.buffers[self.index[name]] = self.rt.QBuffer(array.tobytes())
            self.dims[self.index[name]] = (array.itemsize, array.shape)

    def run(self, **arrays: np.ndarray) -> Any:
        self.set(**arrays)
        success = self.rt.QStatus.QS_SUCCESS
        assert self.exec_obj.setData(self.buffers, self.dims) == success
        assert self.queue.enqueue(self.exec_obj) == success
        status = self.exec_obj.waitForCompletion()
        if status != success:
            return status
        status, out = self.exec_obj.getData()
        assert status == success
        index = self.index["logits"]
        return np.frombuffer(bytes(out[index]), np.float32).reshape(self.dims[index][1])


SKIP = {"past": np.array([]), "past_RetainedState": np.array([])}


def test_recipe_session_keeps_the_state_on_the_card(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, "cores=14", [2])
    prompt = np.arange(16, dtype=np.int64).reshape(2, 8)
    first = session.run(input_ids=prompt, **SKIP)
    assert first.tolist() == [[[28.0] * 8], [[92.0] * 8]]
    second = session.run(input_ids=np.array([[1], [2]]))
    assert second[:, 0, 0].tolist() == [29.0, 94.0]
    third = session.run(input_ids=np.array([[0], [0]]), past=np.ones((2, 4), np.float32))
    assert third[:, 0, 0].tolist() == [1.0, 1.0]


def test_retained_output_comes_back_when_asked_for(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, "", [0])
    past = np.zeros((2, 4), np.float32)
    session.run(input_ids=np.array([[3], [5]]), past=np.array([]), past_RetainedState=past)
    status, out = session.exec_obj.getData()
    assert status == qaicrt.QStatus.QS_SUCCESS
    index = session.index["past_RetainedState"]
    assert np.frombuffer(out[index], np.float32).tolist() == [3.0] * 4 + [5.0] * 4
    assert out[session.index["past"]].size == 0


def test_state_belongs_to_the_activation(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, "", [0])
    session.run(input_ids=np.array([[3], [5]]), **SKIP)
    other = qaicrt.ExecObj(session.context, session.program)
    session.exec_obj = other
    assert session.run(input_ids=np.array([[1], [1]]))[:, 0, 0].tolist() == [4.0, 6.0]
    del session.exec_obj, other
    assert session.program.deactivate() == qaicrt.QStatus.QS_SUCCESS
    assert session.program.activate() == qaicrt.QStatus.QS_SUCCESS
    session.exec_obj = qaicrt.ExecObj(session.context, session.program)
    assert session.run(input_ids=np.array([[1], [1]]))[:, 0, 0].tolist() == [1.0, 1.0]


def test_wrong_shape_fails_in_wait_with_the_vendors_words(
    qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    session = RecipeSession(qaicrt, "", [0])
    status = session.run(input_ids=np.zeros((2, 3), np.int64), **SKIP)
    assert status == qaicrt.QStatus.QS_ERROR
    assert re.search(
        r"^\[\d\d:\d\d:\d\d\.\d{3}\]\[error\]\[Aic-\d+\]No matching dimension found",
        capfd.readouterr().err,
    )
    # The session is not spoilt.
    assert session.run(input_ids=np.array([[3], [5]]))[:, 0, 0].tolist() == [3.0, 5.0]


def test_wrong_element_size_matches_no_dimension(
    qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    session = RecipeSession(qaicrt, "", [0])
    status = session.run(input_ids=np.zeros((2, 8), np.int32), **SKIP)
    assert status == qaicrt.QStatus.QS_ERROR
    assert "No matching dimension found" in capfd.readouterr().err


def test_zero_size_where_no_partial_buffer_is_allowed(
    qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    session = RecipeSession(qaicrt, "", [0])
    assert session.run(input_ids=np.array([])) == qaicrt.QStatus.QS_ERROR
    assert "Partial buffer not allowed for: input_ids" in capfd.readouterr().err
    session.buffers[session.index["input_ids"]] = qaicrt.QBuffer(b"")
    assert session.exec_obj.setData(session.buffers) == qaicrt.QStatus.QS_ERROR


def test_buffers_of_unexpected_size(qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    session = RecipeSession(qaicrt, "", [0])
    index = session.index["input_ids"]
    session.buffers[index] = qaicrt.QBuffer(bytes(1000))
    assert session.exec_obj.setData(session.buffers, session.dims) == qaicrt.QStatus.QS_ERROR
    assert (
        f"Unexpected buffer size at index {index}, buffer size 1000, expected size 128"
        in capfd.readouterr().err
    )
    session.buffers[index] = qaicrt.QBuffer(bytes(64))
    assert session.exec_obj.setData(session.buffers, session.dims) == qaicrt.QStatus.QS_ERROR
    assert session.exec_obj.setData(session.buffers[:-1]) == qaicrt.QStatus.QS_INVAL


def test_partial_buffer_without_dims_overwrites_the_first_bytes(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, "specializations=1", [0])
    past = np.arange(8, dtype=np.float32).reshape(2, 4)
    ids = np.zeros((2, 8), np.int64)
    session.set(past=past, input_ids=ids)
    success = qaicrt.QStatus.QS_SUCCESS
    assert session.exec_obj.setData(session.buffers) == success
    session.buffers[session.index["past"]] = qaicrt.QBuffer(np.float32([9.0]).tobytes())
    assert session.exec_obj.setData(session.buffers) == success
    assert session.exec_obj.run() == success
    _, out = session.exec_obj.getData()
    state = np.frombuffer(out[session.index["past_RetainedState"]], np.float32)
    assert state.tolist() == [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_run_takes_buffers_and_the_dims_of_before(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, "", [0])
    session.run(input_ids=np.array([[1], [2]]), **SKIP)
    session.set(input_ids=np.array([[5], [5]]))
    assert session.exec_obj.run(session.buffers) == qaicrt.QStatus.QS_SUCCESS
    _, out = session.exec_obj.getData()
    assert np.frombuffer(out[session.index["logits"]], np.float32)[[0, 8]].tolist() == [6.0, 7.0]


def test_tuples_change_only_their_slots_and_outputs_are_written_in_place(
    qaicrt: ModuleType,
) -> None:
    session = RecipeSession(qaicrt, "", [1], dev=1)
    success = qaicrt.QStatus.QS_SUCCESS
    logits = np.zeros((2, 1, 8), np.float32)
    ids = (session.index["input_ids"], np.array([[3], [4]]))
    assert session.exec_obj.setData([ids, (session.index["logits"], logits)]) == success
    assert session.queue.enqueue(session.exec_obj) == success
    assert session.exec_obj.waitForCompletion() == success
    assert logits[:, 0, 0].tolist() == [3.0, 4.0]
    status, out = session.exec_obj.getData()
    assert status == success
    assert [buffer.size for buffer in out] == [0] * 4
    assert session.exec_obj.setData([ids]) == success
    assert session.exec_obj.run() == success
    assert logits[:, 0, 0].tolist() == [6.0, 8.0]


def test_slices_move_parts_of_the_state(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, "batch=4", [0])
    success = qaicrt.QStatus.QS_SUCCESS
    spec = {
        "BufferSpecs": [
            {
                "Name": "past.*",
                "ElemSize": 4,
                "DimSpecs": [{"start": "batch_index"}, {"start": "ctx_start"}],
            }
        ]
    }
    status, handle = session.program.createSlicingSpecHandle(json.dumps(spec))
    assert status == success
    index = session.index
    tuples = [
        (index["past"], np.full((1, 2), 7, np.float32)),
        (index["input_ids"], np.ones((4, 1), np.int64)),
    ]
    where = [("batch_index", 2), ("ctx_start", 1)]
    assert session.exec_obj.setDataWithSlices(tuples, handle, where) == (success, handle)
    assert session.exec_obj.run() == success
    part = np.zeros((2, 4), np.float32)
    out = [(index["past_RetainedState"], part)]
    where = [("batch_index", 1), ("ctx_start", 0)]
    assert session.exec_obj.setDataWithSlices(out, handle, where)[0] == success
    assert session.exec_obj.run() == success
    assert part.tolist() == [[2.0] * 4, [2.0, 9.0, 9.0, 2.0]]
    # The wiring was for one inference.
    assert session.exec_obj.run() == success
    assert part.tolist() == [[2.0] * 4, [2.0, 9.0, 9.0, 2.0]]
    where = [("batch_index", 4), ("ctx_start", 0)]
    status, _ = session.exec_obj.setDataWithSlices(out, handle, where)
    assert status == qaicrt.QStatus.QS_INVAL


def test_slices_of_one_buffer_add_up_and_leave_the_callers_memory(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, "batch=3", [0])
    success = qaicrt.QStatus.QS_SUCCESS
    starts = [{"start": "batch_index"}, {"start": 0}]
    spec = {"BufferSpecs": [{"Name": "past", "ElemSize": 4, "DimSpecs": starts}]}
    _, handle = session.program.createSlicingSpecHandle(json.dumps(spec))
    past, ids = session.index["past"], session.index["input_ids"]
    whole = np.ones((3, 4), np.float32)
    assert session.exec_obj.setData([(past, whole), (ids, np.zeros((3, 1), np.int64))]) == success
    for slot in (0, 2):
        # A row that repeats one number, as grouped heads are handed over: no memory of its own.
        row = np.broadcast_to(np.float32(slot + 5), (1, 4))
        where = [("batch_index", slot)]
        assert session.exec_obj.setDataWithSlices([(past, row)], handle, where)[0] == success
    state = np.zeros((3, 4), np.float32)
    session.exec_obj.setData([(session.index["past_RetainedState"], state)])
    assert session.exec_obj.run() == success
    assert state.tolist() == [[5.0] * 4, [1.0] * 4, [7.0] * 4]
    assert whole.tolist() == [[1.0] * 4] * 3


@pytest.mark.parametrize("text", ["", "[]", '{"BufferSpecs": [{"Name": "("}]}', '{"Specs": []}'])
def test_a_malformed_slicing_spec_is_refused(qaicrt: ModuleType, text: str) -> None:
    session = RecipeSession(qaicrt, "", [0])
    status, handle = session.program.createSlicingSpecHandle(text)
    assert (status, handle) == (qaicrt.QStatus.QS_INVAL, None)


def free_nsps(qaicrt: ModuleType) -> list[int]:
    util = qaicrt.Util()
    _, qids = util.getDeviceIds()
    return [util.getResourceInfo(qid)[1].nspFree for qid in qids]


def test_load_takes_dram_and_activate_takes_cores(qaicrt: ModuleType) -> None:
    util, status = qaicrt.Util(), qaicrt.QStatus
    context = qaicrt.Context(qaicrt.QIDList([1]))
    qpc = qaicrt.Qpc(f"cores=7,constants={3 << 30},activation={1 << 30}")
    program = qaicrt.Program(context, 1, qpc)

    def now() -> tuple[int, int, int]:
        info = util.getResourceInfo(1)[1]
        return info.nspFree, info.vcFree, info.dramFree

    states = [now()]
    for step in (program.load, program.activate, program.deactivate, program.unload):
        assert step() == status.QS_SUCCESS
        states.append(now())
    assert states == [
        (14, 16, 16308),
        (14, 16, 16308 - 3072),
        (7, 15, 16308 - 4096),
        (14, 16, 16308 - 3072),
        (14, 16, 16308),
    ]


def test_cores_exhausted(qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    session = RecipeSession(qaicrt, "cores=14", [0])
    program = qaicrt.Program(session.context, 0, qaicrt.Qpc("cores=1"))
    assert program.activate() == qaicrt.QStatus.QS_ERROR
    assert "Device 0 activate failed: Failed to allocate NSP resources" in capfd.readouterr().err
    with pytest.raises(
        RuntimeError, match="QAIC_ERROR_NSP_ALLOC_FAILED: Failed to allocate NSP resources"
    ):
        qaicrt.ExecObj(session.context, program)
    assert program.deactivate() == qaicrt.QStatus.QS_SUCCESS
    del session
    assert program.activate() == qaicrt.QStatus.QS_SUCCESS


def test_channels_exhausted(
    qaicrt: ModuleType, machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    taken = machine.claim({0: Demand(0, 0, 16)})
    program = qaicrt.Program(qaicrt.Context(), 0, qaicrt.Qpc("cores=1"))
    assert program.activate() == qaicrt.QStatus.QS_ERROR
    assert "Device 0 activate failed: Failed to allocate virtual channel" in capfd.readouterr().err
    taken.release()


def test_dram_exhausted(qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    context = qaicrt.Context(qaicrt.QIDList([0]))
    program = qaicrt.Program(context, 0, qaicrt.Qpc(f"constants={17 << 30}"))
    assert program.load() == qaicrt.QStatus.QS_ERROR
    assert "Memory resource exhausted" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="Failed to create execObj"):
        qaicrt.ExecObj(context, program)


def test_deactivate_waits_for_the_last_exec_obj(
    qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    session = RecipeSession(qaicrt, "", [0])
    session.run(input_ids=np.array([[3], [5]]), **SKIP)
    assert session.program.deactivate() == qaicrt.QStatus.QS_INVAL
    assert "Cannot deactivate program, it has active ExecObj" in capfd.readouterr().err
    assert session.program.unload() == qaicrt.QStatus.QS_ERROR
    del session.exec_obj
    assert session.program.deactivate() == qaicrt.QStatus.QS_SUCCESS
    assert session.program.unload() == qaicrt.QStatus.QS_SUCCESS


def test_an_exec_obj_activates_and_deactivates_by_itself(qaicrt: ModuleType) -> None:
    context = qaicrt.Context(qaicrt.QIDList([3]))
    program = qaicrt.Program(context, qpcObj=qaicrt.Qpc("cores=5"))
    exec_obj = qaicrt.ExecObj(context, program)
    assert free_nsps(qaicrt) == [14, 14, 14, 9]
    del exec_obj
    assert free_nsps(qaicrt) == [14] * 4


def test_set_data_needs_an_active_program(
    qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    context = qaicrt.Context()
    program = qaicrt.Program(context, 0, qaicrt.Qpc(""))
    exec_obj = qaicrt.ExecObj(context, program)
    program._deactivate()
    assert exec_obj.setData([]) == qaicrt.QStatus.QS_INVAL
    assert "Invalid program state, not activated" in capfd.readouterr().err
    assert exec_obj.run() == qaicrt.QStatus.QS_INVAL
    assert exec_obj.waitForCompletion() == qaicrt.QStatus.QS_INVAL
    assert exec_obj.getData() == (qaicrt.QStatus.QS_INVAL, [])


def test_without_a_device_id_the_first_with_enough_cores_is_taken(qaicrt: ModuleType) -> None:
    taken = RecipeSession(qaicrt, "cores=8", [0])
    context = qaicrt.Context()
    program = qaicrt.Program(context, None, qaicrt.Qpc("cores=7"))
    assert program.activate() == qaicrt.QStatus.QS_SUCCESS
    assert free_nsps(qaicrt) == [6, 7, 14, 14]
    context = qaicrt.Context(qaicrt.QIDList([0]))
    with pytest.raises(RuntimeError, match="Not enough NSPs"):
        qaicrt.Program(context, None, qaicrt.Qpc("cores=7"))
    del taken


def test_a_device_group_takes_cores_and_its_share_of_dram_on_each(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, f"cores=14,devices=2,constants={4 << 30}", [1, 3])
    assert free_nsps(qaicrt) == [14, 0, 14, 0]
    info = qaicrt.Util().getResourceInfo(3)[1]
    assert info.dramFree == 16308 - 2048 - 1
    assert session.run(input_ids=np.array([[3], [5]]), **SKIP)[:, 0, 0].tolist() == [3.0, 5.0]


@pytest.mark.parametrize("mapping", ["0", "0:9", "0:x", "0:1:2", "1:1"])
def test_a_device_group_of_the_wrong_devices(qaicrt: ModuleType, mapping: str) -> None:
    properties = qaicrt.QAicProgramProperties()
    properties.devMapping = mapping
    with pytest.raises(RuntimeError, match="Failed to create program with Qpc Buffer"):
        qaicrt.Program(qaicrt.Context(), None, qaicrt.Qpc("devices=2"), properties)


def test_programs_on_a_derived_device(qaicrt: ModuleType, machine: Machine) -> None:
    qid, reservation = machine.reserve(1, Demand(4, 1 << 30, 1))
    session = RecipeSession(qaicrt, "cores=4", [qid], dev=qid)
    session.run(input_ids=np.array([[3], [5]]), **SKIP)
    assert free_nsps(qaicrt) == [14, 10, 14, 14, 0]
    reservation.release()
    assert session.exec_obj.run() == qaicrt.QStatus.QS_DEV_ERROR


def test_errors_of_construction_have_the_vendors_words(
    qaicrt: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="Initialization Exception: in object: Context Failed"):
        qaicrt.Context(qaicrt.QIDList([7]))
    assert "Invalid Device 7" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="Failed to open file"):
        qaicrt.Qpc("missing")
    with pytest.raises(RuntimeError, match="QpcObj: Failed to open QPC"):
        qaicrt.Qpc("damaged")
    with pytest.raises(RuntimeError, match="Failed to create program with Qpc Buffer"):
        qaicrt.Program(qaicrt.Context(), 44, qaicrt.Qpc(""))


def test_inputs_are_not_copied(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, "", [0])
    source = np.zeros((2, 8), np.int64)
    assert session.exec_obj.setData([(session.index["input_ids"], source)]) == 0
    assert np.shares_memory(session.exec_obj._inputs["input_ids"], source)


def test_two_inferences_of_one_activation_keep_their_order(qaicrt: ModuleType) -> None:
    session = RecipeSession(qaicrt, "batch=1", [0])
    properties = qaicrt.QAicQueueProperties()
    assert properties.numThreadsPerQueue == 4
    assert session.queue.initProperties(properties) == qaicrt.QStatus.QS_SUCCESS
    pool = [qaicrt.ExecObj(session.context, session.program) for _ in range(8)]
    seen = [np.zeros((1, 1, 8), np.float32) for _ in pool]
    total = 0.0
    expected = []
    for number, (exec_obj, logits) in enumerate(zip(pool, seen, strict=True)):
        ids = np.full((1, 1), number + 1)
        exec_obj.setData([(session.index["input_ids"], ids), (session.index["logits"], logits)])
        assert session.queue.enqueue(exec_obj) == qaicrt.QStatus.QS_SUCCESS
        total += number + 1
        expected.append(total)
    assert [exec_obj.waitForCompletion() for exec_obj in pool] == [0] * 8
    assert [logits[0, 0, 0] for logits in seen] == expected


def test_a_card_in_error_takes_no_work(qaicrt: ModuleType, machine: Machine) -> None:
    session = RecipeSession(qaicrt, "", [0])
    session.run(input_ids=np.array([[3], [5]]), **SKIP)
    machine.set_status(0, 2)
    assert session.queue.enqueue(session.exec_obj) == qaicrt.QStatus.QS_DEV_ERROR
    program = qaicrt.Program(session.context, 0, qaicrt.Qpc("cores=1"))
    assert program.load() == qaicrt.QStatus.QS_DEV_ERROR
    with pytest.raises(RuntimeError, match="Couldn't find a suitable device"):
        qaicrt.Program(session.context, None, qaicrt.Qpc("cores=1"))
    machine.set_status(0, 1)
    assert session.queue.enqueue(session.exec_obj) == qaicrt.QStatus.QS_SUCCESS
    assert session.exec_obj.waitForCompletion() == qaicrt.QStatus.QS_SUCCESS


def test_an_inference_that_breaks_its_thread_does_not_stop_the_queue(
    qaicrt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = RecipeSession(qaicrt, "", [0])
    session.run(input_ids=np.array([[3], [5]]), **SKIP)
    broken: list[type] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: broken.append(args.exc_type))
    activation = session.exec_obj.instance.activation
    works = activation.run
    monkeypatch.setattr(activation, "run", lambda *_: 1 // 0)
    assert session.run(input_ids=np.array([[3], [5]])) == qaicrt.QStatus.QS_ERROR
    monkeypatch.setattr(activation, "run", works)
    assert session.run(input_ids=np.array([[1], [1]]))[:, 0, 0].tolist() == [4.0, 6.0]
    assert broken == [ZeroDivisionError]


def test_an_activation_that_fails_gives_its_cores_back(
    qaicrt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = qaicrt.Program(qaicrt.Context(), 0, qaicrt.Qpc(""))
    assert program.load() == qaicrt.QStatus.QS_SUCCESS
    works = program._loaded.activate
    monkeypatch.setattr(program._loaded, "activate", lambda: bytearray(1 << 62))
    with pytest.raises(MemoryError):
        program.activate()
    assert free_nsps(qaicrt) == [14] * 4
    monkeypatch.setattr(program._loaded, "activate", works)
    assert program.activate() == qaicrt.QStatus.QS_SUCCESS


commands = st.lists(
    st.sampled_from(["load", "activate", "deactivate", "unload", "exec", "drop", "run"]),
    max_size=12,
)


@given(commands)
def test_any_order_of_calls_keeps_the_state_machine(qaicrt: ModuleType, calls: list[str]) -> None:
    """The documented states against the runtime: what is held follows from the state alone."""
    status = qaicrt.QStatus
    context = qaicrt.Context(qaicrt.QIDList([0]))
    program = qaicrt.Program(context, 0, qaicrt.Qpc("cores=7"))
    loaded = active = automatic = False
    exec_objs: list[Any] = []
    for call in calls:
        if call == "load":
            assert program.load() == status.QS_SUCCESS
            loaded = True
        elif call == "activate":
            assert program.activate() == status.QS_SUCCESS
            loaded = active = True
        elif call == "deactivate":
            expected = status.QS_INVAL if exec_objs else status.QS_SUCCESS
            assert program.deactivate() == expected
            active = active and bool(exec_objs)
            automatic = automatic and active
        elif call == "unload":
            assert program.unload() == (status.QS_ERROR if active else status.QS_SUCCESS)
            loaded = loaded and active
        elif call == "exec":
            exec_objs.append(qaicrt.ExecObj(context, program))
            automatic = automatic or not active
            loaded = active = True
        elif call == "drop" and exec_objs:
            exec_objs.pop()
            if not exec_objs and automatic:
                active = automatic = False
        elif call == "run" and exec_objs:
            exec_objs[-1].setData([(1, np.zeros((2, 1), np.int64))])
            assert exec_objs[-1].run() == status.QS_SUCCESS
        info = qaicrt.Util().getResourceInfo(0)[1]
        assert info.nspFree == (7 if active else 14)
        assert (info.dramFree == 16308) == (not loaded)


def test_a_program_for_other_hardware_is_not_loaded(qaicrt: ModuleType, machine: Machine) -> None:
    context, qpc = qaicrt.Context(), qaicrt.Qpc("cores=2")
    qpc.contents.hardware = "ai200"
    program = qaicrt.Program(context, 0, qpc)
    assert program.load() == qaicrt.QStatus.QS_ERROR
    assert program.activate() == qaicrt.QStatus.QS_ERROR
    assert machine.card(0).free == machine.card(0).total
    with pytest.raises(RuntimeError, match="Failed to create execObj"):
        qaicrt.ExecObj(context, program)
