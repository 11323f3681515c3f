"""The application that commands belong to, and the decorator that makes a command of a function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from qaic_ray import __version__
from qaic_ray.cli.recipe_flags import translated
from qaic_ray.files.documents import user_path

if TYPE_CHECKING:
    from qaic_ray import options
    from qaic_ray.cli import parameters
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.request import SdkChoice


class Interrupted(Exception):
    """Carries an interruption past typer, which would make an exit code of its own of it."""

    def __init__(self, interruption: KeyboardInterrupt) -> None:
        super().__init__()
        self.interruption = interruption


class _Commands(TyperGroup):
    """Lets an interruption through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(error) from error


app = typer.Typer(
    name="qaic-ray",
    cls=_Commands,
    help="Run Llama-family models over every Cloud AI 100 card you own, with or without a card.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

switches = SimpleNamespace(debug=False)
"""What stands before the command."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"qaic-ray {__version__}")
        raise typer.Exit


@app.callback()
def before(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Options of every command."""
    switches.debug = debug


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
        args = translated(str(self.name), args)
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


def known_path(parameter: typer.CallbackParam, value: Path) -> Path:
    """The callback of arguments that are paths: `~` put in, or one sentence."""
    return user_path(value, str(parameter.name))


def sdk_choice(sdk: options.SdkOptions, screen: Screen) -> SdkChoice:
    """The SDK that `--sdk` names, said on the screen."""
    from qaic_ray.options import EmulatorOptions
    from qaic_ray.pipeline.request import choose_sdk

    return choose_sdk(sdk.sdk, EmulatorOptions(), screen)
