"""What every pydantic model of a request's body, or of a part of one, is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema

_OF_MANY = ("list", "dict")


def _end_at_first_fault(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") in _OF_MANY:
            schema["fail_fast"] = True
        schema = schema.values()
    elif not isinstance(schema, list | tuple):
        return
    for part in schema:
        _end_at_first_fault(part)


class BodyModel(BaseModel):
    """Fields of a body; the first wrong item of a list or an object ends the check of it.

    pydantic would tell the fault of every item, and a body of some MiB has millions of them.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _end_at_first_fault(schema)
        return schema
