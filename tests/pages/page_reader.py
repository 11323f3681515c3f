"""A reader of a page who types it from top to bottom, in a fresh folder of a fresh home."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from page_blocks import Block, Command
from page_terminal import PageTerminal
from shown_output import difference

COMMAND_S = 600.0
"""A command that takes longer hangs."""
CTRL_C = "^C"
READERS_HOME = "/home/you"
MACHINE_CODE = "QAIC_EMULATOR_CACHE"
"""Names a folder: no link to one is taken, as what is in it is run."""
_CHANGED = ("QAIC_RAY_", "QAIC_EMULATOR_", "RAY_", "XDG_", "PYTEST_", "COV_", "PYTHON")


class PageReader:
    """Types blocks, and compares what comes with what the page shows.

    Args:
        home: an empty folder; paths below it are shown as those of /home/you.
        models: a folder of models that need not be fetched again.
        kept: a folder of the programs that other readers made, for who is not the first. Such a
            reader also has the machine code of emulated cards, which a process of tests shares
            with all others.
    """

    def __init__(self, home: Path, models: Path, kept: Path | None = None) -> None:
        self.home = home
        self.models = models
        self.folder = home / "try"
        self.folder.mkdir(parents=True)
        cache = home / ".cache" / "qaic-ray"
        cache.mkdir(parents=True)
        (cache / "models").symlink_to(models.resolve())
        if kept:
            (kept / "programs").mkdir(parents=True, exist_ok=True, mode=0o700)
            (cache / "programs").symlink_to((kept / "programs").resolve())
        others = {k: value for k, value in os.environ.items() if not k.startswith(_CHANGED)}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):  # a terminal says them
            others.pop(name, None)
        self.environment = others | {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "RAY_AUTH_MODE": "disabled",
        }
        if kept:
            self.environment[MACHINE_CODE] = os.environ[MACHINE_CODE]
        self._stack = ExitStack()
        self._terminal: PageTerminal | None = None
        self._staying: list[PageTerminal] = []

    def __enter__(self) -> PageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, block: Block) -> None:
        """Do what a block says.

        Raises:
            AssertionError: a command failed, or printed something else.
            ShellGone: a command did not end.
        """
        if not block.is_run:
            return
        if block.file is not None:
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            (self.folder / "program.py").write_text(block.text, encoding="utf-8")
            self._type(block, Command("python program.py", ("...",)))
        elif "stays" in block.notes:
            for command in block.commands:
                self._begin(block, command)
        else:
            for command in block.commands:
                self._type(block, command)

    def finish(self) -> None:
        """End what stays, as a reader does."""
        for terminal in self._staying:
            terminal.interrupt()
            code = terminal.ended(COMMAND_S)
            assert code in (0, 130), "\n".join([f"exit code {code}", *terminal.lines()])

    def _new_terminal(self) -> PageTerminal:
        terminal = PageTerminal(self.folder, self.environment)
        self._stack.callback(terminal.close)
        return terminal

    def _type(self, block: Block, command: Command) -> None:
        self._terminal = self._terminal or self._new_terminal()
        self._terminal.begin(command.text)
        shown = list(command.shown)
        if CTRL_C in shown:
            before = shown[: shown.index(CTRL_C)]
            shown.remove(CTRL_C)
            self._wait_for(block, self._terminal, before)
            self._terminal.interrupt()
        code = self._terminal.ended(COMMAND_S)
        printed = self._seen(self._terminal)
        place = f"{block.place}: {command.text.strip()}"
        wanted = int(block.notes.get("exit code") or 0) if command == block_last(block) else 0
        assert code == wanted, "\n".join([f"{place}\nexit code {code}", *printed])
        if block.kind == "console":
            other = difference(shown, printed)
            assert other is None, f"{place}\n{other}"

    def _begin(self, block: Block, command: Command) -> None:
        terminal = self._new_terminal()
        terminal.begin(command.text)
        self._staying.append(terminal)
        self._wait_for(block, terminal, list(command.shown))

    def _wait_for(self, block: Block, terminal: PageTerminal, shown: list[str]) -> None:
        def there() -> bool:
            return difference(shown, self._seen(terminal), ended=False) is None

        code = terminal.until(there, COMMAND_S)
        if code is not None:
            other = difference(shown, self._seen(terminal), ended=False)
            raise AssertionError(f"{block.place}: it ended, with exit code {code}\n{other}")

    def _seen(self, terminal: PageTerminal) -> list[str]:
        homes = (str(self.home), str(self.home.resolve()))
        return [_at_home(line, homes) for line in terminal.lines()]


def block_last(block: Block) -> Command | None:
    """The last command of a block: the one that its exit code is of."""
    commands = block.commands
    return commands[-1] if commands else None


def _at_home(line: str, homes: tuple[str, ...]) -> str:
    for home in homes:
        line = line.replace(home, READERS_HOME)
    return line
