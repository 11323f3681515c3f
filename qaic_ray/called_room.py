"""A room of the package whose name is also that of a function: `qaic_ray.export(...)`.

Python makes a room the attribute of the package when it is first imported, in place of whatever was
there; so the room itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CalledRoom(ModuleType):
    """A module that passes a call on to the function of its name in `qaic_ray.api.functions`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        """The function's, for `help` and editors."""
        from inspect import signature

        return signature(self._function)

    @property
    def _function(self) -> Any:
        from importlib import import_module

        functions = import_module("qaic_ray.api.functions")  # above this; when it is called
        return getattr(functions, self.__name__.rpartition(".")[2])


def can_be_called(room: str) -> None:
    """Let a room be called."""
    sys.modules[room].__class__ = CalledRoom
