"""The application that commands belong to, and the decorator that makes a command of a function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from qaic_ray import __version__
from qaic_ray.cli.flags.recipe import translated
from qaic_ray.errors import ExitCode, UsageError
from qaic_ray.files.documents import user_path

if TYPE_CHECKING:
    from qaic_ray import options
    from qaic_ray.cli.flags.call import CommandCall
    from qaic_ray.cli.flags.page import HelpPage
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.request import SdkChoice


class Interrupted(Exception):
    """Carries an interruption past typer, which would make an exit code of its own of it."""

    def __init__(self, interruption: KeyboardInterrupt) -> None:
        super().__init__()
        self.interruption = interruption


class Commands(TyperGroup):
    """A group of commands: its page, its mistakes, and guesses at its help."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command of the line; a mistake on the line is a `UsageError` as any other."""
        from qaic_ray.cli.flags.mistakes import LineMistake, sentence

        if not extra.get("standalone_mode", True):
            return super().main(*args, **extra)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except LineMistake as error:
            raise UsageError(sentence(error)) from error
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Let an interruption through."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(error) from error

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `help`, `help COMMAND` and `version` for what they mean; nothing, for `-h`."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit(ExitCode.USAGE)
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        elif args == ["version"] and ctx.parent is None:
            args = ["--version"]
        return list(super().parse_args(ctx, args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that a word names, or one sentence with the nearest."""
        known = self.list_commands(ctx)
        is_option = args[0].startswith("-")
        if ctx.resilient_parsing or is_option or self.get_command(ctx, args[0]) is not None:
            return super().resolve_command(ctx, args)
        from qaic_ray.cli.flags.mistakes import no_command

        raise UsageError(no_command(ctx, args[0], known))

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names in the order of use; what the order does not know, last."""
        if ctx is not None and ctx.parent is not None:
            return list(self.commands)
        names = [name for _, names in _IN_ORDER for name in names]
        return sorted(self.commands, key=lambda n: names.index(n) if n in names else len(names))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        from qaic_ray.cli.flags.page import page_text, terminal_width

        formatter.write(page_text(self.page(ctx), terminal_width()))

    def page(self, ctx: Any) -> HelpPage:
        """What the help says."""
        from qaic_ray.cli.flags.page import HelpEntry, HelpPage, entry_of

        known = {name: self.commands[name] for name in self.list_commands(ctx)}
        titles = dict(_IN_ORDER) if ctx.parent is None else {}
        named = {name: title for title, names in titles.items() for name in names}
        panels: dict[str, list[HelpEntry]] = {title: [] for title in titles}
        for name, command in known.items():
            if not command.hidden:
                entry = HelpEntry((name,), (command.help or "").partition("\n\n")[0])
                panels.setdefault(named.get(name, "Commands"), []).append(entry)
        panels["Options"] = [entry_of(param) for param in self.get_params(ctx)]
        if ctx.parent is None:
            from qaic_ray.environment import ENVIRONMENT

            entries = [HelpEntry((name,), text) for name, text in ENVIRONMENT.items()]
            panels["Environment variables"] = entries
        usage = f"{ctx.command_path} [OPTIONS] COMMAND ..."
        whole = tuple((title, tuple(entries)) for title, entries in panels.items() if entries)
        return HelpPage(usage, self.help or "", _examples(self), whole)


_IN_ORDER = (
    ("Run", ("run", "serve", "demo", "init", "launch", "plan", "schema")),
    ("Step by step", ("export", "compile", "check")),
    ("Look at runs", ("report", "merge", "compare", "runs", "status", "logs", "show", "stop")),
    ("Machines", ("devices", "doctor", "monitoring", "key", "ray", "emulator")),
)
"""The commands, as one after the other is of use to somebody who is new."""

_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
}
"""Of every command. Words of a flag may be joined by underscores too, as in the recipe."""

app = typer.Typer(
    name="qaic-ray",
    cls=Commands,
    help="Run Llama-family models over every Cloud AI 100 card you own, with or without a card.",
    epilog="""qaic-ray run smollm2-135m "The capital of France is"
qaic-ray demo
qaic-ray help run""",
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change any key of a job: export.opset=13."),
]

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
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print and exit."),
    ] = False,
) -> None:
    """Options of every command."""
    switches.debug = debug


class _FromTree(TyperCommand):
    """A command that reads its parameters when it is asked for them."""

    function: Callable[..., None]

    @cached_property
    def _call(self) -> CommandCall:
        from qaic_ray.cli.flags.call import CommandCall

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
        if not ctx.resilient_parsing:
            args = translated(str(self.name), args)
        typed = [word.partition("=")[0] for word in args]
        for flag in self._call.flags:
            flag.named_as(typed)
        bare = {name: flag for flag in self._call.flags if flag.opt.bare for name in flag.names}
        full = []
        for word, after in zip(args, [*args, None][1:], strict=False):
            found = bare.get(word.replace("_", "-"))
            is_bare = found is not None and not found.takes(after)
            full.append(f"{word}={found.opt.bare}" if found and is_bare else word)
        from qaic_ray.cli.flags.mistakes import LineMistake

        try:
            return list(super().parse_args(ctx, full))
        except LineMistake as error:
            # Click does not always say of which command it is.
            error.ctx = getattr(error, "ctx", None) or ctx  # type: ignore[attr-defined]
            raise

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The options that begin so: by the names that people learn, else by others too."""
        found = list(super().shell_complete(ctx, incomplete))
        others = {alias for flag in self._call.flags for alias in flag.opt.aliases}
        return [item for item in found if item.value not in others] or found

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        from qaic_ray.cli.flags.page import page_text, terminal_width

        formatter.write(page_text(self.page(ctx), terminal_width()))

    def page(self, ctx: Any) -> HelpPage:
        """What the help says."""
        from qaic_ray.cli.flags.call import PANELS
        from qaic_ray.cli.flags.page import HelpPage, in_panels, place_of

        params = self.get_params(ctx)
        places = [place_of(param) for param in params if param.param_type_name == "argument"]
        usage = " ".join([ctx.command_path, "[OPTIONS]", *places])
        entries = list(self._call.entries(params))
        return HelpPage(usage, self.help or "", _examples(self), in_panels(entries, PANELS))


def _examples(command: Any) -> tuple[str, ...]:
    """Lines of shell that show a command at work, as it was registered with them."""
    return tuple((command.epilog or "").splitlines())


def command(
    app: typer.Typer, name: str | None = None, *, example: str = "", **how: Any
) -> Callable[[Any], Any]:
    """The decorator of a function that is a command; see the module's docstring.

    Args:
        app: that it belongs to.
        name: where it is not the function's.
        example: lines of shell for its help page; a test runs each.
        how: as typer takes it.
    """
    settings = _SETTINGS | how.pop("context_settings", {})

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def listed() -> None:
            """Stands for the function in the list of commands."""

        listed.__doc__ = function.__doc__
        cls = type("_Command", (_FromTree,), {"function": staticmethod(function)})
        registered = app.command(
            name or function.__name__, cls=cls, epilog=example, context_settings=settings, **how
        )
        registered(listed)
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
