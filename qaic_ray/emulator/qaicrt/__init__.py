"""The vendor's Python runtime API, whole: every class that programs for LLMs use.

Covered: contexts, queues, programs (load, activate, deactivate, unload, device groups), ExecObjs
(lists of QBuffers, lists of tuples, slices), inference sets, program groups, device queries; the
statuses and exceptions of each as far as public sources tell them. Inferred: which side of a slice
its offset counts on, and that slices last for one inference. Not covered: profiling handles,
statistics of operators, live reporting, DMA buffers.
"""

from __future__ import annotations

from typing import Any, Type

from .. import folder
from .buffers import BufferDimensionsVecRef, BufferMapping, QBuffer
from .context import Context, Qpc
from .device_query import Util
from .exec_obj import ExecObj, Queue
from .groups import (
    InferenceBenchmarkSet,
    InferenceHandle,
    InferenceSet,
    InferenceVector,
)
from .program import Program
from .program_group import ProgramGroup
from .types import (
    BenchmarkProperties,
    BufferIoTypeEnum,
    ExecObjInfo,
    Properties,
    QAicBufferDataTypeEnum,
    QAicDeviceType,
    QAicProgramGroupProperties,
    QAicProgramGroupPropertiesProtocol,
    QAicProgramStatus,
    QAicQueueProperties,
    QDevInfo,
    QDevStatus,
    QIDList,
    QLogLevel,
    QPerformanceInfo,
    QResourceInfo,
    QStatus,
    program_property_class,
)

QAicProgramProperties: Type[Properties]

__all__ = [
    "BenchmarkProperties",
    "BufferDimensionsVecRef",
    "BufferIoTypeEnum",
    "BufferMapping",
    "Context",
    "ExecObj",
    "ExecObjInfo",
    "InferenceBenchmarkSet",
    "InferenceHandle",
    "InferenceSet",
    "InferenceVector",
    "Program",
    "ProgramGroup",
    "QAicBufferDataTypeEnum",
    "QAicDeviceType",
    "QAicProgramGroupProperties",
    "QAicProgramGroupPropertiesProtocol",
    "QAicProgramProperties",
    "QAicProgramStatus",
    "QAicQueueProperties",
    "QBuffer",
    "QDevInfo",
    "QDevStatus",
    "QIDList",
    "QLogLevel",
    "QPerformanceInfo",
    "QResourceInfo",
    "QStatus",
    "Qpc",
    "Queue",
    "Util",
]


def __getattr__(name: str) -> Any:
    # Made when it is first asked for: it depends on the version of the SDK folder.
    if name != "QAicProgramProperties":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = program_property_class(folder.current().version)
    globals()[name] = made
    return made
