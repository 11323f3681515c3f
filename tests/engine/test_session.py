"""What a card's refusals are taken for: busy, gone, or neither; by the vendor's statuses."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from qaic_ray.engine.session import Session
from qaic_ray.errors import DeviceBusy, DeviceError, DeviceLost

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs


@pytest.fixture
def qpc(tiny: TinyQpcs) -> Path:
    return tiny.qpc(batch_size=2)


@pytest.fixture
def rt(tiny: TinyQpcs, qpc: Path) -> ModuleType:
    Session(tiny.sdk, qpc, [1]).close()  # puts the runtime on the path
    return importlib.import_module("qaicrt")


def refusal(tiny: TinyQpcs, qpc: Path) -> DeviceError:
    with pytest.raises(DeviceError) as caught:
        Session(tiny.sdk, qpc, [1])
    return caught.value


@pytest.mark.parametrize("call", ["load", "activate"])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("QS_NOMEM", DeviceBusy),
        ("QS_NOSPC", DeviceBusy),
        ("QS_BUSY", DeviceBusy),
        ("QS_NODEV", DeviceLost),
        ("QS_DEV_ERROR", DeviceLost),
        ("QS_AGAIN", DeviceError),
        ("QS_INVAL", DeviceError),
        ("QS_UNSUPPORTED", DeviceError),
        ("QS_TIMEDOUT", DeviceError),
    ],
)
def test_a_status_is_what_it_says(
    tiny: TinyQpcs,
    qpc: Path,
    rt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    status: str,
    kind: type[DeviceError],
) -> None:
    monkeypatch.setattr(rt.Program, call, lambda _: getattr(rt.QStatus, status))
    error = refusal(tiny, qpc)
    assert type(error) is kind
    assert error.status == status
    assert f"could not {call} {qpc}: {status}" in str(error)


@pytest.mark.parametrize(
    ("dev_status", "nsps", "call", "kind"),
    [
        ("QDS_READY", 4, "activate", DeviceBusy),
        ("QDS_READY", 4, "load", DeviceBusy),
        ("QDS_READY", 14, "load", DeviceBusy),
        ("QDS_READY", 14, "activate", DeviceError),  # nobody else has any
        ("QDS_ERROR", 14, "activate", DeviceLost),
        ("QDS_ERROR", 14, "load", DeviceLost),
        (None, 14, "load", DeviceLost),
    ],
)
def test_where_the_status_says_nothing_the_card_is_asked(
    tiny: TinyQpcs,
    qpc: Path,
    rt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    dev_status: str | None,
    nsps: int,
    call: str,
    kind: type[DeviceError],
) -> None:
    def info(*_: object) -> tuple[Any, Any]:
        if dev_status is None:
            return rt.QStatus.QS_NODEV, None
        found = SimpleNamespace(devStatus=getattr(rt.QDevStatus, dev_status))
        return rt.QStatus.QS_SUCCESS, found

    free = SimpleNamespace(nspFree=nsps, nspTotal=14)
    monkeypatch.setattr(rt.Util, "getDeviceInfo", info)
    monkeypatch.setattr(rt.Util, "getResourceInfo", lambda *_: (rt.QStatus.QS_SUCCESS, free))
    monkeypatch.setattr(rt.Program, call, lambda _: rt.QStatus.QS_ERROR)
    error = refusal(tiny, qpc)
    assert type(error) is kind
    assert "QS_ERROR" in str(error)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("QAIC_ERROR_NSP_ALLOC_FAILED: Failed to allocate NSP resources", DeviceBusy),
        ("Couldn't find a suitable device", DeviceBusy),
        ("Initialization Exception: in object: Context: Failed to create Context", DeviceLost),
        ("Failed to create execObj", DeviceError),
        ("NSP 3 crashed", DeviceError),
    ],
)
def test_an_exception_is_what_its_text_says(
    tiny: TinyQpcs,
    qpc: Path,
    rt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    kind: type[DeviceError],
) -> None:
    def raises(_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(rt.Program, "activate", raises)
    error = refusal(tiny, qpc)
    assert type(error) is kind
    assert text in str(error)


def test_cores_that_another_program_has_are_a_busy_card(tiny: TinyQpcs, qpc: Path) -> None:
    other = Session(tiny.sdk, qpc, [1])
    try:
        assert type(refusal(tiny, qpc)) is DeviceBusy
    finally:
        other.close()
