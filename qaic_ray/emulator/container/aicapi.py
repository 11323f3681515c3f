"""Messages that describe a program's inputs and outputs; wire-compatible with `QAicApi_pb2`.

This file imports no other file of the package: installed, it stands alone as
`dev/python/QAicApi_pb2.py`. The schema is our own, written from field numbers and types; it
lives in a private descriptor pool, so that it never clashes with another copy in the process.
Works with protobuf 3.20 and newer.

`IoDesc.selected_set.bindings` are the buffers in order (inputs, then outputs), with the dims of
the largest specialization. `IoDesc.allowed_shapes` has one entry a specialization, in binding
order, and is empty when there is only one.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal import enum_type_wrapper

_PACKAGE = "aicapi"
_DIRECTIONS = {"BUFFER_IO_TYPE_INPUT": 0, "BUFFER_IO_TYPE_OUTPUT": 1}
_DATA_TYPES = {
    "FLOAT_TYPE": 0,
    "FLOAT_16_TYPE": 1,
    "INT8_Q_TYPE": 2,
    "UINT8_Q_TYPE": 3,
    "INT16_Q_TYPE": 4,
    "INT32_Q_TYPE": 5,
    "INT32_I_TYPE": 6,
    "INT64_I_TYPE": 7,
    "INT8_TYPE": 8,
    "BFLOAT16_TYPE": 11,
    "TYPE_INVALID": 0xFF,
}
_ENUMS = {"bufferIoDirectionEnum": _DIRECTIONS, "bufferIoDataTypeEnum": _DATA_TYPES}

# Message -> {field: (number, type)}; a leading * means repeated.
_MESSAGES: Dict[str, Dict[str, Tuple[int, str]]] = {
    "DmaBufInfo": {
        "dma_buf_index": (1, "uint32"),
        "dma_size": (2, "uint32"),
        "io_binding_offset": (3, "uint32"),
        "dma_offset": (4, "uint32"),
    },
    "TensorShape": {"type": (1, "bufferIoDataTypeEnum"), "dims": (2, "*int32")},
    "IoShapes": {"shapes": (1, "*TensorShape")},
    "IoBinding": {
        "name": (1, "string"),
        "index": (2, "uint32"),
        "type": (3, "bufferIoDataTypeEnum"),
        "dir": (4, "bufferIoDirectionEnum"),
        "quant_scale": (5, "float"),
        "quant_offset": (6, "int32"),
        "dims": (7, "*int32"),
        "size": (8, "uint32"),
        "dma_buf_info": (9, "*DmaBufInfo"),
        "is_partial_buf_allowed": (10, "bool"),
        "is_valid": (20, "bool"),
    },
    "IoSet": {"name": (1, "string"), "bindings": (2, "*IoBinding")},
    "RuntimeConstants": {"name": (1, "string"), "size": (2, "uint32"), "offset": (3, "uint32")},
    "DmaBuf": {"index": (1, "uint32"), "size": (2, "uint32"), "dir": (3, "bufferIoDirectionEnum")},
    "IoDesc": {
        "io_sets": (1, "*IoSet"),
        "selected_set": (2, "IoSet"),
        "program_name": (3, "string"),
        "dma_buf": (4, "*DmaBuf"),
        "runtime_constants": (5, "*RuntimeConstants"),
        "pre_process_skip_stages": (6, "*IoSet"),
        "post_process_skip_stages": (7, "*IoSet"),
        "allowed_shapes": (8, "*IoShapes"),
    },
}


Fields = Dict[str, Tuple[int, str]]


def message_pool(
    file_name: str,
    package: str,
    messages: Dict[str, Fields],
    enums: Optional[Dict[str, Dict[str, int]]] = None,
) -> Any:
    """A descriptor pool with one proto3 file: message -> fields, enum -> values."""
    enums = enums or {}
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=file_name, package=package, syntax="proto3")
    for enum_name, values in enums.items():
        enum = file.enum_type.add(name=enum_name)
        for name, number in values.items():
            enum.value.add(name=name, number=number)
    for message_name, fields in messages.items():
        message = file.message_type.add(name=message_name)
        for name, (number, type_name) in fields.items():
            field = message.field.add(name=name, number=number)
            repeated = type_name.startswith("*")
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            type_name = type_name.lstrip("*")
            if type_name in enums or type_name in messages:
                field.type = kinds.TYPE_ENUM if type_name in enums else kinds.TYPE_MESSAGE
                field.type_name = f".{package}.{type_name}"
            else:
                field.type = getattr(kinds, f"TYPE_{type_name.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool


def message_class(pool: Any, name: str) -> Any:
    """The class of a message by its full name."""
    descriptor = pool.FindMessageTypeByName(name)
    get_class = getattr(message_factory, "GetMessageClass", None)
    if get_class is None:  # before protobuf 4.22
        get_class = message_factory.MessageFactory(pool).GetPrototype  # type: ignore[attr-defined]
    return get_class(descriptor)


_pool = message_pool("QAicApi.proto", _PACKAGE, _MESSAGES, _ENUMS)
DESCRIPTOR = _pool.FindFileByName("QAicApi.proto")


def _enum(name: str) -> Any:
    return enum_type_wrapper.EnumTypeWrapper(_pool.FindEnumTypeByName(f"{_PACKAGE}.{name}"))


bufferIoDirectionEnum = _enum("bufferIoDirectionEnum")  # noqa: N816 - the vendor's name
bufferIoDataTypeEnum = _enum("bufferIoDataTypeEnum")  # noqa: N816 - the vendor's name

BUFFER_IO_TYPE_INPUT = 0
BUFFER_IO_TYPE_OUTPUT = 1
FLOAT_TYPE = 0
FLOAT_16_TYPE = 1
INT8_Q_TYPE = 2
UINT8_Q_TYPE = 3
INT16_Q_TYPE = 4
INT32_Q_TYPE = 5
INT32_I_TYPE = 6
INT64_I_TYPE = 7
INT8_TYPE = 8
BFLOAT16_TYPE = 11
TYPE_INVALID = 0xFF

DmaBufInfo = message_class(_pool, "aicapi.DmaBufInfo")
TensorShape = message_class(_pool, "aicapi.TensorShape")
IoShapes = message_class(_pool, "aicapi.IoShapes")
IoBinding = message_class(_pool, "aicapi.IoBinding")
IoSet = message_class(_pool, "aicapi.IoSet")
RuntimeConstants = message_class(_pool, "aicapi.RuntimeConstants")
DmaBuf = message_class(_pool, "aicapi.DmaBuf")
IoDesc = message_class(_pool, "aicapi.IoDesc")
