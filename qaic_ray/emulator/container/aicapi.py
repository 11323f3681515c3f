"""Messages that describe a program's inputs and outputs; wire-compatible with `QAicApi_pb2`.

Knows nothing of the other files of this package: installed, it stands alone as
`dev/python/QAicApi_pb2.py`. The schema is our own, written from field numbers and types; it
lives in a private descriptor pool, so that it never clashes with another copy in the process.
Works with protobuf 3.20 and newer.

`IoDesc.selected_set.bindings` are the buffers in order (inputs, then outputs), with the dims of
the largest specialization. `IoDesc.allowed_shapes` has one entry a specialization, in binding
order, and is empty when there is only one.
"""

from __future__ import annotations

from typing import Any, Dict, Tuple

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


def _fill_field(field: Any, number: int, type_name: str) -> None:
    kinds = descriptor_pb2.FieldDescriptorProto
    repeated = type_name.startswith("*")
    type_name = type_name.lstrip("*")
    field.number = number
    field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
    if type_name in _ENUMS:
        field.type, field.type_name = kinds.TYPE_ENUM, f".{_PACKAGE}.{type_name}"
    elif type_name in _MESSAGES:
        field.type, field.type_name = kinds.TYPE_MESSAGE, f".{_PACKAGE}.{type_name}"
    else:
        field.type = getattr(kinds, f"TYPE_{type_name.upper()}")


def _schema() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="QAicApi.proto", package=_PACKAGE, syntax="proto3"
    )
    for enum_name, values in _ENUMS.items():
        enum = file.enum_type.add(name=enum_name)
        for name, number in values.items():
            enum.value.add(name=name, number=number)
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, (number, type_name) in fields.items():
            _fill_field(message.field.add(name=name), number, type_name)
    return file


def _message_class(pool: Any, name: str) -> Any:
    descriptor = pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")
    get_class = getattr(message_factory, "GetMessageClass", None)
    if get_class is None:  # before protobuf 4.22
        get_class = message_factory.MessageFactory(pool).GetPrototype  # type: ignore[attr-defined]
    return get_class(descriptor)


_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(_schema().SerializeToString())
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

DmaBufInfo = _message_class(_pool, "DmaBufInfo")
TensorShape = _message_class(_pool, "TensorShape")
IoShapes = _message_class(_pool, "IoShapes")
IoBinding = _message_class(_pool, "IoBinding")
IoSet = _message_class(_pool, "IoSet")
RuntimeConstants = _message_class(_pool, "RuntimeConstants")
DmaBuf = _message_class(_pool, "DmaBuf")
IoDesc = _message_class(_pool, "IoDesc")
