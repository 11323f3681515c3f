"""numba's decorators as the kernels use them: compiled on import, for one set of types, cached.

Kernels run without the GIL, and what they call is compiled into them. They are cached in this
folder or, where that cannot be written, in the user's cache, by processor. numba looks only at the
file of a kernel to tell whether its cache is old: what a kernel calls, and its constants, stand
there too.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
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

    def made(function: Function, *, cache: bool) -> Function:
        return cast("Function", numba.njit(signature, cache=cache, **_OPTIONS)(function))

    def compiled(function: Function) -> Function:
        try:
            return made(function, cache=True)
        except _BAD_CACHE as error:
            _log.info("The cache of %s is of another version: %s", function.__name__, error)
            _remove_cache(function)
        except RuntimeError as error:  # numba's, where it finds no folder for its cache
            _log.info("Compiling without a cache: %s", error)
            return made(function, cache=False)
        try:
            return made(function, cache=True)
        except _BAD_CACHE:  # in a folder that is not ours
            return made(function, cache=False)

    return compiled


_BAD_CACHE = (AttributeError, EOFError, ImportError, pickle.UnpicklingError)
"""What numba raises over a cache that is torn, or names classes that are no more."""


def _remove_cache(function: Callable[..., Any]) -> None:
    source = Path(function.__code__.co_filename)
    for path in (source.parent / "__pycache__").glob(f"{source.stem}.{function.__name__}-*.nb?"):
        path.unlink(missing_ok=True)


def tuple_of(kind: type[tuple[Any, ...]], *members: Any) -> Any:
    """The type of a NamedTuple; its members must not be all alike, which numba types otherwise."""
    return types.NamedTuple(members, kind)


def _arrays(kind: Any) -> dict[int, Any]:
    """C-contiguous, by number of dimensions."""
    return {num_dims: types.Array(kind, num_dims, "C") for num_dims in (1, 2, 3)}


FLOAT32, FLOAT64 = _arrays(types.float32), _arrays(types.float64)
INT32, INT64 = _arrays(types.int32), _arrays(types.int64)
READ_ONLY = types.Array(types.float32, 2, "C", readonly=True)
"""float32 with two dimensions; an array that can be written to is taken too."""
READ_ONLY_ROW = types.Array(types.float32, 1, "C", readonly=True)
