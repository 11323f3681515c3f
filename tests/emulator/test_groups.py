"""Inference sets, benchmark sets and program groups over the fake program."""

from __future__ import annotations

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
    assert group.addProgram(qaicrt.Qpc("cores=8")) == (status.QS_INVAL, None)
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


def test_a_group_gets_no_cores_that_are_taken(qaicrt: ModuleType, machine: Machine) -> None:
    taken = machine.claim({1: Demand(7, 0, 1)})
    group = qaicrt.ProgramGroup(qaicrt.Context(), 1, "late")
    group.enable()
    status, program = group.addProgram(qaicrt.Qpc("cores=8"))
    assert (status, program) == (qaicrt.QStatus.QS_ERROR, None)
    taken.release()
