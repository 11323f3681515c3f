"""`qaicrt.Util`: what the runtime tells of the cards. Telemetry is simulated."""

from __future__ import annotations

import fcntl
import os
import time
from typing import Dict, Optional, Tuple

from ..card import Card, Machine, NoDevice
from ..card.sku import (
    FIRST_DERIVED_QID,
    FREQUENCIES_HZ,
    NUM_MCIDS,
    NUM_SEMAPHORES,
    PCI_BUS,
    device_node,
    dram_unit,
    hardware_serial,
    image_version,
    mhi_id,
)
from .types import (
    QAicDeviceType,
    QDevData,
    QDevInfo,
    QDevStatus,
    QIDList,
    QPciInfo,
    QPerformanceInfo,
    QResourceInfo,
    QStatus,
    incompatible,
    to_uint,
)

HARDWARE_VERSION = 0x20000000


def resource_info(machine: Machine, card: Card) -> QResourceInfo:
    """Resources of a card."""
    _, unit_bytes = dram_unit(machine.folder.version)
    return QResourceInfo(
        dramTotal=card.total.dram_bytes // unit_bytes,
        dramFree=card.free.dram_bytes // unit_bytes,
        vcTotal=card.total.num_vcs,
        vcFree=card.free.num_vcs,
        nspTotal=card.total.num_nsps,
        nspFree=card.free.num_nsps,
        mcidTotal=NUM_MCIDS,
        mcidFree=NUM_MCIDS,
        semTotal=NUM_SEMAPHORES,
        semFree=NUM_SEMAPHORES,
        pcTotal=card.sku.num_physical_channels,
        skuType=card.sku.code,
    )


def performance_info(card: Card) -> QPerformanceInfo:
    """Clocks and bandwidth of a card, now."""
    sensors = card.telemetry(time.time())
    return QPerformanceInfo(
        nspFrequencyHz=sensors.nsp_frequency_hz,
        ddrFrequencyHz=FREQUENCIES_HZ["ddr"],
        compFrequencyHz=FREQUENCIES_HZ["compnoc"],
        memFrequencyHz=FREQUENCIES_HZ["memnoc"],
        sysFrequencyHz=FREQUENCIES_HZ["sysnoc"],
        peakCompute=card.sku.peak_tops * 1e12,
        dramBw=sensors.dram_bandwidth_kbps,
    )


def device_info(machine: Machine, card: Card) -> QDevInfo:
    """Everything that the runtime tells of a card."""
    firmware = machine.folder.version
    is_derived = card.qid >= FIRST_DERIVED_QID
    return QDevInfo(
        qid=card.qid,
        devStatus=QDevStatus(card.status),
        name=device_node(card.qid),
        mhiId=mhi_id(card.qid, card.parent),
        pciInfo=QPciInfo()
        if is_derived
        else QPciInfo(
            bus=PCI_BUS + card.qid,
            classname="Processing accelerators",
            vendorname="Qualcomm",
            devicename="Device a100",
        ),
        devData=QDevData(
            fwVersionMajor=firmware[0],
            fwVersionMinor=firmware[1],
            fwVersionPatch=firmware[2] if len(firmware) > 2 else 0,
            fwQCImageVersionString=image_version("QSM", firmware),
            fwImageVariantString="AIC100.REL",
            hwVersion=HARDWARE_VERSION,
            serial=hardware_serial(card.qid),
            numLoadedConsts=card.num_loaded,
            numConstsInUse=card.num_active,
            numLoadedNWs=card.num_loaded,
            numActiveNWs=card.num_active,
            resourceInfo=resource_info(machine, card),
            performanceInfo=performance_info(card),
        ),
    )


class Util:
    """Queries of devices."""

    def __init__(self) -> None:
        self._machine = Machine.here()
        self._locks: Dict[int, int] = {}

    def checkLibraryVersion(self) -> QStatus:
        """Whether library and header fit each other; here they always do."""
        return QStatus.QS_SUCCESS

    def getAicVersion(self) -> Tuple[QStatus, int, int, str, str]:
        """Status, major, minor, patch and variant of the library."""
        major, minor, *patch = self._machine.folder.version
        return QStatus.QS_SUCCESS, major, minor, str(patch[0] if patch else 0), "LRT.AIC.REL"

    def getDeviceIds(
        self, deviceType: QAicDeviceType = QAicDeviceType.QAIC_DEVICE_TYPE_DEFAULT
    ) -> Tuple[QStatus, QIDList]:
        """Status and the ids of all devices."""
        if not isinstance(deviceType, QAicDeviceType):
            raise incompatible("getDeviceIds")
        qids = QIDList(card.qid for card in self._machine.cards())
        return (QStatus.QS_SUCCESS if qids else QStatus.QS_NODEV), qids

    def getDeviceInfo(self, devID: int) -> Tuple[QStatus, Optional[QDevInfo]]:
        """Status and everything known of a device."""
        card = self._card(devID)
        if card is None:
            return QStatus.QS_NODEV, None
        return QStatus.QS_SUCCESS, device_info(self._machine, card)

    def getResourceInfo(self, devID: int) -> Tuple[QStatus, Optional[QResourceInfo]]:
        """Status and the resources of a device."""
        card = self._card(devID)
        if card is None:
            return QStatus.QS_NODEV, None
        return self._status(card), resource_info(self._machine, card)

    def getPerformanceInfo(self, devID: int) -> Tuple[QStatus, Optional[QPerformanceInfo]]:
        """Status and the clocks of a device."""
        card = self._card(devID)
        if card is None:
            return QStatus.QS_NODEV, None
        return self._status(card), performance_info(card)

    def lockDevice(self, devID: int, lock: bool, block: bool) -> QStatus:
        """Advisory lock of a device over all processes; needs `QAIC_SERIALIZE_DEVICE=1`."""
        if os.environ.get("QAIC_SERIALIZE_DEVICE") != "1":
            return QStatus.QS_UNSUPPORTED
        if self._card(devID) is None:
            return QStatus.QS_NODEV
        if not lock:
            descriptor = self._locks.pop(devID, None)
            if descriptor is not None:
                os.close(descriptor)
            return QStatus.QS_SUCCESS
        if devID in self._locks:
            return QStatus.QS_SUCCESS
        path = self._machine.state / f"device-{devID}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return QStatus.QS_BUSY
        self._locks[devID] = descriptor
        return QStatus.QS_SUCCESS

    def _card(self, qid: int) -> Optional[Card]:
        try:
            return self._machine.card(to_uint(qid, "Util"))
        except NoDevice:
            return None

    @staticmethod
    def _status(card: Card) -> QStatus:
        is_ready = card.status == QDevStatus.QDS_READY
        return QStatus.QS_SUCCESS if is_ready else QStatus.QS_DEV_ERROR
