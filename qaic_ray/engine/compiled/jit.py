"""numba's decorators as the kernels use them: compiled on import, for one set of types, cached.

Kernels run without the GIL, and what they call is compiled into them. They are cached in this
folder or, where that cannot be written, in the user's cache, by processor. numba looks only at the
file of a kernel to tell whether its cache is old: what a kernel calls, and its constants, stand
there too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_log = logging.getLogger(__name__)

types: Any = numba.types
"""Untyped: numba makes its attributes as it is imported."""

Function = TypeVar("Function", bound=Callable[..., Any])

IS_COMPILED = not numba.config.DISABLE_JIT
"""Whether these decorators compile: not where NUMBA_DISABLE_JIT is set."""

_OPTIONS = {"nogil": True, "error_model": "numpy"}


def helper(function: Function) -> Function:
    """A function that kernels call."""
    return cast("Function", numba.njit(**_OPTIONS)(function))


def rough(function: Function) -> Function:
    """As `helper`, for sums in any order: what it gives is known only within bounds."""
    return cast("Function", numba.njit(**_OPTIONS, fastmath={"reassoc", "nsz"})(function))


def kernel(*arguments: Any) -> Callable[[Function], Function]:
    """A function of arguments of these types that gives an int64."""
    signature = types.int64(*arguments)

    def compiled(function: Function) -> Function:
        try:
            made = numba.njit(signature, cache=True, **_OPTIONS)(function)
        except RuntimeError as error:  # numba's, where it finds no folder for its cache
            _log.info("Compiling without a cache: %s", error)
            made = numba.njit(signature, **_OPTIONS)(function)
        return cast("Function", made)

    return compiled


def tuple_of(kind: type[tuple[Any, ...]], *members: Any) -> Any:
    """The type of a NamedTuple."""
    return types.NamedTuple(members, kind)


def _arrays(kind: Any) -> dict[int, Any]:
    """C-contiguous, by number of dimensions."""
    return {num_dims: types.Array(kind, num_dims, "C") for num_dims in (1, 2, 3)}


FLOAT32, FLOAT64 = _arrays(types.float32), _arrays(types.float64)
INT32, INT64 = _arrays(types.int32), _arrays(types.int64)
READ_ONLY = types.Array(types.float32, 2, "C", readonly=True)
"""float32 with two dimensions; an array that can be written to is taken too."""
READ_ONLY_ROW = types.Array(types.float32, 1, "C", readonly=True)
