"""The form that an answer must have, as requests say it, in the words of sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qaic_ray.files.documents import shown
from qaic_ray.serve.api_errors import bad_request

_PARAM = "response_format"
_KINDS = "text, json_object or json_schema"


def structured_fields(response_format: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields of a `response_format`; none for plain text.

    Raises:
        ApiError: it is of no kind that there is.
    """
    match response_format.get("type"):
        case "text":
            return {}
        case "json_object":
            return {"structured_outputs": {"json_object": True}}
        case "json_schema":
            return {"structured_outputs": {"json": _schema(response_format)}}
        case "structural_tag":
            raise bad_request(f"structural_tag is not offered: {_PARAM} is {_KINDS}.", _PARAM)
    kind = shown(response_format.get("type"))
    raise bad_request(f"{_PARAM} is of the type {kind}: it is {_KINDS}.", _PARAM)


def _schema(response_format: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = response_format.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise bad_request(f"{_PARAM}.json_schema.schema is missing: give a JSON schema.", _PARAM)
    try:
        json.dumps(schema)
    except RecursionError as error:
        raise bad_request(f"{_PARAM} is nested too deep.", _PARAM) from error
    return schema
