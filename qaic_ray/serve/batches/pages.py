"""Lists of the interface: a page of objects, and where the next one begins. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qaic_ray.files.documents import shown
from qaic_ray.serve.api_errors import bad_request

ASCENDING, DESCENDING = "asc", "desc"
_MAX_DIGITS = 9


@dataclass(frozen=True)
class Paging:
    """Which page of a list is asked for: up to `limit` objects behind the id `after`."""

    limit: int
    after: str = ""
    order: str = DESCENDING


def read_paging(query: Mapping[str, str], *, default: int, most: int) -> Paging:
    """What a query asks for.

    Raises:
        ApiError: 400, by the field.
    """
    given = query.get("limit", str(default))
    is_number = given.isascii() and given.isdigit() and len(given) <= _MAX_DIGITS
    if not is_number or not 1 <= int(given) <= most:
        raise bad_request(f"limit is {shown(given)}: it is a number from 1 to {most}.", "limit")
    order = query.get("order", DESCENDING)
    if order not in (ASCENDING, DESCENDING):
        raise bad_request(f"order is {shown(order)}: it is asc or desc.", "order")
    return Paging(int(given), query.get("after", ""), order)


def page_of(ids: Sequence[str], paging: Paging) -> tuple[Sequence[str], bool]:
    """The ids of one page, and whether more come behind it.

    Args:
        ids: all of them, in any order. By their order they were given.
        paging: `after` may be an id that is gone.
    """
    is_down = paging.order == DESCENDING
    ordered = sorted(ids, reverse=is_down)
    after = paging.after
    if after:
        ordered = [id_ for id_ in ordered if (id_ < after if is_down else id_ > after)]
    return ordered[: paging.limit], len(ordered) > paging.limit


def list_document(documents: Sequence[Mapping[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page as the interface's object."""
    ids = [document["id"] for document in documents]
    return {
        "object": "list",
        "data": list(documents),
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": has_more,
    }
