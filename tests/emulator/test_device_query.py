"""`qaicrt.Util`: what it tells of the cards, and the advisory lock."""

from __future__ import annotations

from types import ModuleType

import pytest

from qaic_ray.emulator.card import Machine


def test_util_tells_of_the_cards(qaicrt: ModuleType, machine: Machine) -> None:
    util, status = qaicrt.Util(), qaicrt.QStatus
    assert util.checkLibraryVersion() == status.QS_SUCCESS
    assert util.getAicVersion()[:3] == (status.QS_SUCCESS, 1, 20)
    assert util.getDeviceIds() == (status.QS_SUCCESS, [0, 1, 2, 3])
    _, info = util.getDeviceInfo(2)
    assert info.devStatus == qaicrt.QDevStatus.QDS_READY
    assert info.devData.resourceInfo.nspTotal == 14
    assert (info.qid, info.name, info.pciInfo.bus) == (2, "/dev/accel/accel2", 0x38)
    assert info.mhiId == 2
    assert util.getPerformanceInfo(2)[1].ddrFrequencyHz == 2_133_000_000
    assert util.getDeviceInfo(8) == (status.QS_NODEV, None)
    assert util.getResourceInfo(8)[0] == util.getPerformanceInfo(8)[0] == status.QS_NODEV
    machine.set_status(2, 2)
    assert util.getResourceInfo(2)[0] == status.QS_DEV_ERROR
    assert util.getDeviceInfo(2)[1].devStatus == qaicrt.QDevStatus.QDS_ERROR


def test_a_device_is_locked_for_others(qaicrt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, status = qaicrt.Util(), qaicrt.Util(), qaicrt.QStatus
    assert first.lockDevice(0, True, False) == status.QS_UNSUPPORTED
    monkeypatch.setenv("QAIC_SERIALIZE_DEVICE", "1")
    assert first.lockDevice(0, True, False) == status.QS_SUCCESS
    assert second.lockDevice(0, True, False) == status.QS_BUSY
    assert second.lockDevice(1, True, True) == status.QS_SUCCESS
    assert first.lockDevice(0, False, False) == status.QS_SUCCESS
    assert second.lockDevice(0, True, False) == status.QS_SUCCESS
    assert first.lockDevice(9, True, False) == status.QS_NODEV
    for qid in (0, 1):
        second.lockDevice(qid, False, False)
