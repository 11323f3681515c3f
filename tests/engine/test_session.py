"""What a card's refusals are taken for: busy, gone, or neither; by the vendor's statuses."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from answering import changed

from qaic_ray.engine.session import Session, load_runtime
from qaic_ray.errors import DeviceBusy, DeviceError, DeviceLost

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs


@pytest.fixture
def qpc(tiny: TinyQpcs) -> Path:
    return tiny.qpc(batch_size=2)


@pytest.fixture
def rt(tiny: TinyQpcs) -> ModuleType:
    return load_runtime(tiny.sdk)[0]


def refusal(tiny: TinyQpcs, qpc: Path, **attributes: Any) -> DeviceError:
    """The error of a session on a runtime that differs in some attributes."""
    rt, api = load_runtime(tiny.sdk)
    with pytest.raises(DeviceError) as caught:
        Session(tiny.sdk, qpc, [1], runtime=(changed(rt, **attributes), api))
    return caught.value


def subclass(kind: type, **methods: Any) -> type:
    return type(kind.__name__, (kind,), methods)


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
    call: str,
    status: str,
    kind: type[DeviceError],
) -> None:
    program = subclass(rt.Program, **{call: lambda _: getattr(rt.QStatus, status)})
    error = refusal(tiny, qpc, Program=program)
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
    util = subclass(
        rt.Util, getDeviceInfo=info, getResourceInfo=lambda *_: (rt.QStatus.QS_SUCCESS, free)
    )
    program = subclass(rt.Program, **{call: lambda _: rt.QStatus.QS_ERROR})
    error = refusal(tiny, qpc, Util=util, Program=program)
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
    text: str,
    kind: type[DeviceError],
) -> None:
    def raises(_: object) -> None:
        raise RuntimeError(text)

    error = refusal(tiny, qpc, Program=subclass(rt.Program, activate=raises))
    assert type(error) is kind
    assert text in str(error)


def test_cores_that_another_program_has_are_a_busy_card(tiny: TinyQpcs, qpc: Path) -> None:
    other = Session(tiny.sdk, qpc, [1])
    try:
        assert type(refusal(tiny, qpc)) is DeviceBusy
    finally:
        other.close()
