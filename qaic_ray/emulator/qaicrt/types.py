"""The plain types of `qaicrt`: enums, device lists, properties and device descriptions.

They are as strict as the vendor's compiled ones: an unknown attribute is an AttributeError, a
value of the wrong kind a TypeError.
"""

from __future__ import annotations

import enum
import operator
from dataclasses import dataclass, field
from typing import Any, Iterable, List, Mapping, Tuple, Type


class _VendorEnum(enum.IntEnum):
    """An enum that prints as the vendor's do, `QStatus.QS_SUCCESS`, on every Python."""

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class QStatus(_VendorEnum):
    """What a call answered."""

    QS_SUCCESS = 0
    QS_PERM = 1
    QS_AGAIN = 2
    QS_NOMEM = 3
    QS_BUSY = 4
    QS_NODEV = 5
    QS_INVAL = 6
    QS_NOSPC = 7
    QS_BADFD = 8
    QS_TIMEDOUT = 9
    QS_PROTOCOL = 10
    QS_UNSUPPORTED = 11
    QS_DATA_CRC_ERROR = 12
    QS_DEV_ERROR = 300
    QS_ERROR = 500


class QLogLevel(_VendorEnum):
    """Least severity that is logged."""

    QL_DEBUG = 0
    QL_INFO = 1
    QL_WARN = 2
    QL_ERROR = 3


class QDevStatus(_VendorEnum):
    """State of a card."""

    QDS_INITIALIZING = 0
    QDS_READY = 1
    QDS_ERROR = 2


class BufferIoTypeEnum(_VendorEnum):
    """Direction of a buffer, seen from the host."""

    BUFFER_IO_TYPE_INPUT = 1
    BUFFER_IO_TYPE_OUTPUT = 2


class QAicBufferDataTypeEnum(_VendorEnum):
    """Element type of a buffer."""

    BUFFER_DATA_TYPE_FLOAT = 0
    BUFFER_DATA_TYPE_FLOAT16 = 1
    BUFFER_DATA_TYPE_INT8Q = 2
    BUFFER_DATA_TYPE_UINT8Q = 3
    BUFFER_DATA_TYPE_INT16Q = 4
    BUFFER_DATA_TYPE_INT32Q = 5
    BUFFER_DATA_TYPE_INT32I = 6
    BUFFER_DATA_TYPE_INT64I = 7
    BUFFER_DATA_TYPE_INT8 = 8
    BUFFER_DATA_TYPE_BFLOAT16 = 11
    BUFFER_DATA_TYPE_INVAL = 0xFF


class QAicDeviceType(_VendorEnum):
    """Kind of devices to list."""

    QAIC_DEVICE_TYPE_DEFAULT = 1


class QAicProgramGroupPropertiesProtocol(_VendorEnum):
    """How a program group switches between its programs."""

    QAIC_PROGRAM_GROUP_PROTOCOL_CONTROL_PATH = 0
    QAIC_PROGRAM_GROUP_PROTOCOL_DATA_PATH = 1


class QAicProgramStatus(_VendorEnum):
    """State of a program; everything from 100 on is an error."""

    QAIC_PROGRAM_INIT = 0
    QAIC_PROGRAM_LOADED = 1
    QAIC_PROGRAM_FULLY_ACTIVATED = 2
    QAIC_PROGRAM_ERROR = 100
    QIAC_PROGRAM_LOAD_ERROR = 101
    QIAC_PROGRAM_ACTIVATE_ERROR = 102


def incompatible(call: str) -> TypeError:
    """The error of a call whose arguments have the wrong types."""
    return TypeError(f"{call}: incompatible function arguments.")


def to_uint(value: Any, call: str) -> int:
    """`value` as an unsigned integer, TypeError when it is none."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise incompatible(call) from error
    if number < 0:
        raise incompatible(call)
    return number


class QIDList(List[int]):
    """Device ids."""

    def __init__(self, qids: Iterable[int] = ()) -> None:
        super().__init__(to_uint(qid, "QIDList") for qid in qids)

    def append(self, qid: int) -> None:
        """Add one device id."""
        super().append(to_uint(qid, "append"))

    def __repr__(self) -> str:
        return f"QIDList{list(self)!r}"


class Properties:
    """A closed set of typed attributes; subclasses come from `property_class`."""

    __slots__ = ("_values",)
    _defaults: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self._values = dict(self._defaults)

    def value(self, name: str, default: Any) -> Any:
        """The property `name`, or `default` in an SDK that does not have it."""
        return self._values.get(name, default)


def _property(name: str, kind: Type[Any]) -> property:
    def get(self: Properties) -> Any:
        return self._values[name]

    def put(self: Properties, value: Any) -> None:
        if kind is int and not isinstance(value, enum.Enum):
            self._values[name] = to_uint(value, f"{type(self).__name__}.{name}")
        elif isinstance(value, kind):
            self._values[name] = value
        else:
            raise incompatible(f"{type(self).__name__}.{name}")

    return property(get, put)


class ProgramProperties(Properties):
    """Any SDK version's `QAicProgramProperties`."""

    __slots__ = ()


class QueueProperties(Properties):
    """Properties of a queue."""

    __slots__ = ()


def property_class(
    name: str, defaults: Mapping[str, Any], parent: Type[Properties] = Properties
) -> Type[Properties]:
    """A class of properties with these names; a value must be of its default's type."""
    members = {key: _property(key, type(value)) for key, value in defaults.items()}
    namespace = {"__slots__": (), "_defaults": dict(defaults), "__module__": "qaicrt", **members}
    return type(name, (parent,), namespace)


DEFAULT_TIMEOUT_MS = 5000
DEFAULT_NUM_RETRIES = 5
DEFAULT_NUM_QUEUE_THREADS = 4


def program_property_class(version: Tuple[int, ...]) -> Type[Properties]:
    """`QAicProgramProperties` as that Apps SDK version has it."""
    defaults = {"devMapping": "", "selectMask": 0}
    if version >= (1, 22):
        defaults.update(dataPathTimeoutMs=DEFAULT_TIMEOUT_MS, submitNumRetries=DEFAULT_NUM_RETRIES)
    else:
        defaults.update(
            SubmitRetryTimeoutMs=DEFAULT_TIMEOUT_MS, SubmitNumRetries=DEFAULT_NUM_RETRIES
        )
    return property_class("QAicProgramProperties", defaults, ProgramProperties)


QAicQueueProperties = property_class(
    "QAicQueueProperties",
    {"properties": 1, "numThreadsPerQueue": DEFAULT_NUM_QUEUE_THREADS},
    QueueProperties,
)
QAicProgramGroupProperties = property_class(
    "QAicProgramGroupProperties",
    {
        "protocolSelect": (
            QAicProgramGroupPropertiesProtocol.QAIC_PROGRAM_GROUP_PROTOCOL_CONTROL_PATH
        )
    },
)
BenchmarkProperties = property_class(
    "BenchmarkProperties", {"numThreadsPerQueue": DEFAULT_NUM_QUEUE_THREADS}
)


@dataclass
class QPciInfo:
    """Where a card is on the bus."""

    domain: int = 0
    bus: int = 0
    device: int = 0
    function: int = 0
    classname: str = ""
    vendorname: str = ""
    devicename: str = ""


@dataclass
class QResourceInfo:
    """Resources of a card; `dram*` in MB, from Apps 1.21 on in KB."""

    dramTotal: int = 0
    dramFree: int = 0
    fragmentationStatus: int = 0
    vcTotal: int = 0
    vcFree: int = 0
    nspTotal: int = 0
    nspFree: int = 0
    mcidTotal: int = 0
    mcidFree: int = 0
    semTotal: int = 0
    semFree: int = 0
    pcTotal: int = 0
    pcReserved: int = 0
    skuType: int = 0


@dataclass
class QPerformanceInfo:
    """Clocks and bandwidth of a card (simulated)."""

    nspFrequencyHz: int = 0
    ddrFrequencyHz: int = 0
    compFrequencyHz: int = 0
    memFrequencyHz: int = 0
    sysFrequencyHz: int = 0
    peakCompute: float = 0.0
    dramBw: float = 0.0


@dataclass
class ExecObjInfo:
    """Which ExecObj of a benchmark ended, and how.

    `execObjIndex` counts within an activation. `programId` is inferred: it is the activation's.
    """

    execObjIndex: int
    activationIndex: int
    programId: int
    programName: str
    status: QStatus = QStatus.QS_INVAL


@dataclass
class QDevData:
    """What a card's firmware says of itself."""

    fwVersionMajor: int = 0
    fwVersionMinor: int = 0
    fwVersionPatch: int = 0
    fwVersionBuild: int = 0xFF
    fwQCImageVersionString: str = ""
    fwOEMImageVersionString: str = ""
    fwImageVariantString: str = ""
    hwVersion: int = 0
    serial: str = ""
    numLoadedConsts: int = 0
    numConstsInUse: int = 0
    numLoadedNWs: int = 0
    numActiveNWs: int = 0
    resourceInfo: QResourceInfo = field(default_factory=QResourceInfo)
    performanceInfo: QPerformanceInfo = field(default_factory=QPerformanceInfo)


@dataclass
class QDevInfo:
    """A card, as `Util.getDeviceInfo` tells it; `mhiId` is its number on the MHI bus."""

    qid: int
    devStatus: QDevStatus
    name: str
    mhiId: int = 0
    pciInfo: QPciInfo = field(default_factory=QPciInfo)
    devData: QDevData = field(default_factory=QDevData)
