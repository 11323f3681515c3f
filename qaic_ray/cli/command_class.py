"""What a command is to typer: its parameters, and how it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from qaic_ray.cli import parameters


class Interrupted(Exception):
    """Carries an interruption past typer, which would make an exit code of its own of it."""

    def __init__(self, interruption: KeyboardInterrupt) -> None:
        super().__init__()
        self.interruption = interruption


class CommandGroup(TyperGroup):
    """Lets an interruption through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(error) from error


class _FromTree(TyperCommand):
    """A command that reads its parameters when it is asked for them."""

    function: Callable[..., None]

    @cached_property
    def _call(self) -> parameters.CommandCall:
        from qaic_ray.cli.parameters import CommandCall

        return CommandCall(self.function)

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, `--help` among them."""
        if not self.params:
            whole = typer.Typer(add_completion=False)
            whole.command()(self._call.as_function())
            made = typer.main.get_command(whole)
            self.params, self.callback = made.params, made.callback
        return list(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write out the flags that may stand without a value, as typer's may not, then parse.

        What is refused is named as it was typed, with dashes or underscores.
        """
        typed = {word.partition("=")[0] for word in args}
        for flag in self._call.flags:
            flag.flag = next((word for word in flag.spellings if word in typed), flag.flag)
        bare = {word: flag for flag in self._call.flags if flag.opt.bare for word in flag.spellings}
        following = [*args, None][1:] if args else []
        full = [
            f"{word}={flag.opt.bare}" if flag and not flag.takes(after) else word
            for word, after, flag in zip(args, following, map(bare.get, args), strict=True)
        ]
        return list(super().parse_args(ctx, full))


def command(app: typer.Typer, name: str | None = None, **how: Any) -> Callable[[Any], Any]:
    """The decorator of a function that is a command; see the module's docstring."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def listed() -> None:
            """Stands for the function in the list of commands."""

        listed.__doc__ = function.__doc__
        cls = type("_Command", (_FromTree,), {"function": staticmethod(function)})
        app.command(name or function.__name__, cls=cls, **how)(listed)
        return function

    return register
