"""Inference sets, benchmark sets and program groups over the fake program."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qaic_ray.emulator.card import Demand, Machine


def buffers(rt: ModuleType, qpc: Any, value: int) -> list[Any]:
    vector = rt.InferenceVector(qpc.getBufferMappings())
    vector.getVector()[1] = rt.QBuffer(np.full((2, 8), value, np.int64).tobytes())
    return list(vector.getVector())


def test_a_set_takes_one_instance_for_each_activation(qaicrt: ModuleType, machine: Machine) -> None:
    qpc = qaicrt.Qpc(f"cores=4,constants={1 << 30},activation={1 << 20}")
    inferences = qaicrt.InferenceSet(qaicrt.Context(), qpc, 0, 2, 3)
    free = machine.card(0).free
    assert (free.num_nsps, free.num_vcs) == (2, 13)
    assert free.dram_bytes == machine.card(0).total.dram_bytes - (1 << 30) - 3 * (1 << 20)
    assert inferences.num_handles == 6


def test_the_tutorials_loop(qaicrt: ModuleType) -> None:
    qpc = qaicrt.Qpc("cores=2")
    inferences = qaicrt.InferenceSet(qaicrt.Context(), qpc, 0, 2, 1)
    success = qaicrt.QStatus.QS_SUCCESS
    sums = []
    for number in range(5):
        status, handle = inferences.getAvailable()
        assert status == success
        # The past is given with each inference, so the answers do not build on each other.
        assert handle.setBuffers(buffers(qaicrt, qpc, number)) == success
        assert inferences.submit(handle, number) == success
        status, done = inferences.getCompletedId(number)
        assert (status, done.id) == (success, number)
        status, out = done.getBuffers()
        assert status == success
        sums.append(np.frombuffer(out[2], np.float32)[0])
        assert inferences.putCompleted(done) == success
    assert sums == [0, 8, 16, 24, 32]


def test_vectors_are_submitted_and_completed_in_order(qaicrt: ModuleType) -> None:
    qpc = qaicrt.Qpc("cores=2")
    inferences = qaicrt.InferenceSet(qaicrt.Context(), qpc, 0, 3, 1)
    vector = qaicrt.InferenceVector(qpc.getBufferMappings())
    for number in range(3):
        assert vector.setBuffers(buffers(qaicrt, qpc, number)) == qaicrt.QStatus.QS_SUCCESS
        assert inferences.submit(vector, number) == qaicrt.QStatus.QS_SUCCESS
    assert inferences.waitForCompletion() == qaicrt.QStatus.QS_SUCCESS
    assert [inferences.getCompleted()[1].id for _ in range(3)] == [0, 1, 2]
    assert vector.setBuffers([]) == qaicrt.QStatus.QS_INVAL


def test_too_many_activations_are_refused(qaicrt: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="QAIC_ERROR_NSP_ALLOC_FAILED"):
        qaicrt.InferenceSet(qaicrt.Context(), qaicrt.Qpc("cores=14"), 0, 1, 2)


def test_a_benchmark_counts_and_rates(qaicrt: ModuleType) -> None:
    qpc = qaicrt.Qpc("cores=1")
    benchmark = qaicrt.InferenceBenchmarkSet(
        qaicrt.Context(), qpc, 0, 2, 2, buffers(qaicrt, qpc, 1), qaicrt.BenchmarkProperties()
    )
    status = qaicrt.QStatus
    assert benchmark.run(3) == status.QS_ERROR
    assert benchmark.enable() == status.QS_SUCCESS
    assert benchmark.run(0) == status.QS_INVAL
    assert benchmark.run(25) == status.QS_SUCCESS
    completed, rate, microseconds, batch_size = benchmark.getLastRunStats()
    assert (completed, batch_size) == (25, 2)
    assert rate == pytest.approx(25 / (microseconds / 1e6), rel=1e-3)
    assert benchmark.run(5) == status.QS_SUCCESS
    assert benchmark.getInfCompleted() == [30]
    assert benchmark.disable() == status.QS_SUCCESS


def test_a_benchmark_that_does_not_fit_says_so(qaicrt: ModuleType) -> None:
    qpc = qaicrt.Qpc("cores=14")
    benchmark = qaicrt.InferenceBenchmarkSet(qaicrt.Context(), qpc, 0, 1, 2, [])
    assert benchmark.enable() == qaicrt.QStatus.QS_ERROR


def test_a_benchmark_with_wrong_buffers_fails_and_can_go_on(qaicrt: ModuleType) -> None:
    qpc = qaicrt.Qpc("cores=1")
    benchmark = qaicrt.InferenceBenchmarkSet(qaicrt.Context(), qpc, 0, 2, 1, [])
    assert benchmark.enable() == qaicrt.QStatus.QS_SUCCESS
    assert benchmark.run(3) == qaicrt.QStatus.QS_ERROR
    assert benchmark.run(3) == qaicrt.QStatus.QS_ERROR


def test_programs_of_a_group_share_their_cores(qaicrt: ModuleType, machine: Machine) -> None:
    context, status = qaicrt.Context(), qaicrt.QStatus
    group = qaicrt.ProgramGroup(context, 1, "pair", qaicrt.QAicProgramGroupProperties())
    assert group.enable() == status.QS_SUCCESS
    programs = []
    for cores in (8, 12, 14):
        answer, program = group.addProgram(qaicrt.Qpc(f"cores={cores}"))
        assert answer == status.QS_SUCCESS
        programs.append(program)
    assert machine.card(1).free.num_nsps == 0
    assert (machine.card(1).num_loaded, machine.card(1).num_active) == (3, 3)
    answer, program = group.addProgram(qaicrt.Qpc("cores=15"))
    assert (answer, program) == (status.QS_ERROR, None)
    exec_obj = qaicrt.ExecObj(context, programs[0])
    exec_obj.setData([(1, np.ones((2, 1), np.int64))])
    assert group.enqueue(exec_obj) == status.QS_SUCCESS
    assert exec_obj.waitForCompletion() == status.QS_SUCCESS
    assert group.disable(False, 0) == status.QS_INVAL
    del exec_obj
    assert group.disable(False, 0) == status.QS_SUCCESS
    assert machine.card(1).free == machine.card(1).total


def test_a_group_that_is_disabled_by_force_lets_go_of_what_exec_objs_hold(
    qaicrt: ModuleType, machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    status, context = qaicrt.QStatus, qaicrt.Context()
    group = qaicrt.ProgramGroup(context, 1, "forced")
    group.enable()
    program = group.addProgram(qaicrt.Qpc("cores=4"))[1]
    exec_obj = qaicrt.ExecObj(context, program)
    assert group.disable(True, 0) == status.QS_SUCCESS
    assert machine.card(1).free == machine.card(1).total
    assert capfd.readouterr().err == ""
    assert group.enqueue(exec_obj) == status.QS_INVAL
    assert group.enable() == status.QS_SUCCESS
    assert group.enqueue(exec_obj) == status.QS_INVAL  # it was of the activation that is gone
    again = qaicrt.ExecObj(context, program)
    again.setData([(1, np.ones((2, 1), np.int64))])
    assert group.enqueue(again) == status.QS_SUCCESS
    assert again.waitForCompletion() == status.QS_SUCCESS
    del exec_obj, again
    assert group.disable(False, 0) == status.QS_SUCCESS


def test_a_group_gets_no_cores_that_are_taken(qaicrt: ModuleType, machine: Machine) -> None:
    taken = machine.claim({1: Demand(7, 0, 1)})
    group = qaicrt.ProgramGroup(qaicrt.Context(), 1, "late")
    group.enable()
    status, program = group.addProgram(qaicrt.Qpc("cores=8"))
    assert (status, program) == (qaicrt.QStatus.QS_ERROR, None)
    taken.release()


def test_programs_are_added_before_the_group_is_enabled(
    qaicrt: ModuleType, machine: Machine
) -> None:
    """The order of calls of both public stable-diffusion programs."""
    context, status = qaicrt.Context(), qaicrt.QStatus
    group = qaicrt.ProgramGroup(context, 1, "pair", qaicrt.QAicProgramGroupProperties())
    added = [group.addProgram(qaicrt.Qpc(f"cores={cores}")) for cores in (8, 14)]
    assert [answer for answer, _ in added] == [status.QS_SUCCESS] * 2
    assert machine.card(1).free == machine.card(1).total
    with pytest.raises(RuntimeError, match="Failed to create execObj"):
        qaicrt.ExecObj(context, added[0][1])
    assert group.enable() == status.QS_SUCCESS
    assert machine.card(1).free.num_nsps == 0
    assert machine.card(1).num_active == 2
    exec_obj = qaicrt.ExecObj(context, added[1][1])
    qpc = added[1][1].qpc
    assert exec_obj.setData(buffers(qaicrt, qpc, 3)) == status.QS_SUCCESS
    assert group.enqueue(exec_obj) == status.QS_SUCCESS
    assert exec_obj.waitForCompletion() == status.QS_SUCCESS
    assert np.frombuffer(exec_obj.getData()[1][2], np.float32)[0] == 24
    del exec_obj
    for _ in range(2):
        assert group.disable(False, 0) == status.QS_SUCCESS
        assert machine.card(1).free == machine.card(1).total
        assert group.enable() == status.QS_SUCCESS
        assert machine.card(1).free.num_nsps == 0


def test_a_group_that_does_not_fit_is_not_enabled_and_holds_nothing(
    qaicrt: ModuleType, machine: Machine
) -> None:
    taken = machine.claim({1: Demand(7, 0, 1)})
    group = qaicrt.ProgramGroup(qaicrt.Context(), 1, "late")
    for cores in (4, 8):
        assert group.addProgram(qaicrt.Qpc(f"cores={cores}"))[0] == qaicrt.QStatus.QS_SUCCESS
    before = machine.card(1)
    assert group.enable() == qaicrt.QStatus.QS_ERROR
    assert machine.card(1) == before
    taken.release()
    assert group.enable() == qaicrt.QStatus.QS_SUCCESS


def test_who_waits_for_a_submission_that_failed_gets_its_status(qaicrt: ModuleType) -> None:
    qpc, status = qaicrt.Qpc("cores=2"), qaicrt.QStatus
    inferences = qaicrt.InferenceSet(qaicrt.Context(), qpc, 0, 1, 1)
    vector = qaicrt.InferenceVector(qpc.getBufferMappings())
    vector.getVector()[1] = qaicrt.QBuffer(bytes(3))  # neither whole nor partial
    with ThreadPoolExecutor(1) as waiting:
        for number in range(3):
            answer = waiting.submit(inferences.getCompletedId, number)
            assert inferences.submit(vector, number) != status.QS_SUCCESS
            failed, handle = answer.result(10)
            assert failed == status.QS_ERROR
            assert handle.id == number
            assert inferences.putCompleted(handle) == status.QS_SUCCESS
    # The place is there once, as before.
    _, handle = inferences.getAvailable()
    assert handle.setBuffers(buffers(qaicrt, qpc, 1)) == status.QS_SUCCESS
    assert inferences.submit(handle, 7) == status.QS_SUCCESS
    assert inferences.getCompletedId(7) == (status.QS_SUCCESS, handle)


def test_a_benchmarks_callback_sees_results_and_gives_the_next_data(qaicrt: ModuleType) -> None:
    qpc, status = qaicrt.Qpc("cores=1"), qaicrt.QStatus
    benchmark = qaicrt.InferenceBenchmarkSet(
        qaicrt.Context(), qpc, 0, 2, 2, buffers(qaicrt, qpc, 1), qaicrt.BenchmarkProperties()
    )
    assert benchmark.enable() == status.QS_SUCCESS
    seen = []

    def completed(exec_obj: Any, info: Any) -> None:
        result = np.frombuffer(exec_obj.getData()[1][2], np.float32)[0]
        seen.append(
            (info.activationIndex, info.execObjIndex, info.programName, info.status, result)
        )
        assert exec_obj.setData(buffers(qaicrt, qpc, 5)) == status.QS_SUCCESS

    assert benchmark.enableExecObjCompletionCallback(completed) is None
    assert benchmark.run(8) == status.QS_SUCCESS
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    ok = status.QS_SUCCESS
    assert seen == [
        *((*place, "counter", ok, 8.0) for place in places),
        *((*place, "counter", ok, 40.0) for place in places),
    ]
    benchmark.disableExecObjCompletionCallback()
    assert benchmark.run(4) == ok
    assert len(seen) == 8
    with pytest.raises(TypeError):
        benchmark.enableExecObjCompletionCallback(None)


def test_an_error_of_a_callback_reaches_the_program_and_the_benchmark_goes_on(
    qaicrt: ModuleType,
) -> None:
    qpc = qaicrt.Qpc("cores=1")
    benchmark = qaicrt.InferenceBenchmarkSet(
        qaicrt.Context(), qpc, 0, 3, 1, buffers(qaicrt, qpc, 1)
    )
    benchmark.enable()

    def completed(exec_obj: Any, info: Any) -> None:
        raise KeyError("mine")

    benchmark.enableExecObjCompletionCallback(completed)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            benchmark.run(9)
    benchmark.disableExecObjCompletionCallback()
    assert benchmark.run(9) == qaicrt.QStatus.QS_SUCCESS
    assert benchmark.getLastRunStats()[0] == 9


def test_operators_are_not_measured_and_that_is_said(qaicrt: ModuleType) -> None:
    qpc = qaicrt.Qpc("cores=1")
    benchmark = qaicrt.InferenceBenchmarkSet(qaicrt.Context(), qpc, 0, 1, 1, [])
    status = benchmark.enableOpStatsCallback(print, 0, 1, 1)
    assert status == qaicrt.QStatus.QS_UNSUPPORTED
    assert benchmark.disableOpStatsCallback() == qaicrt.QStatus.QS_SUCCESS
