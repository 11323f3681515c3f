"""The pages of exit codes and errors, whose sentences are read out of the code."""

from __future__ import annotations

import ast
import inspect
import re
import signal
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import qaic_ray
from qaic_ray import errors
from qaic_ray.errors import ExitCode, QaicRayError, UsageError
from qaic_ray.reference.markdown import code, page, section, table
from qaic_ray.serve.api_errors import STATUSES

PACKAGE = Path(qaic_ray.__file__).parent
SIGNALS = {
    signal.SIGHUP: "The terminal was closed.",
    signal.SIGINT: "Ctrl-C.",
    signal.SIGPIPE: "`qaic-ray run ... | head -1`: nobody reads stdout any more.",
    signal.SIGTERM: "`kill PID`, or a batch system whose time is over.",
}
EXAMPLES = {
    ExitCode.DONE: "Every row has its answer.",
    ExitCode.FAILED: "One row of a thousand was longer than the context: see errors.jsonl.",
    ExitCode.USAGE: "`qaic-ray run smollm2-135m --temperature hot`",
    ExitCode.FAULT: "A mistake in the code: please report the file.",
    ExitCode.UNFINISHED: "The disk is full: `qaic-ray run --resume RUN` goes on.",
}
"""A case of each."""
ROOMS = {
    "cli": "The command line",
    "options": "Options and job files",
    "option_types.py": "Options and job files",
    "pipeline": "Options and job files",
    "shipped": "Options and job files",
    "sampling_params": "Sampling",
    "formats": "Prompts files",
    "rows.py": "Prompts files",
    "runs": "Runs and their folders",
    "inspect": "Runs and their folders",
    "report": "Runs and their folders",
    "fleet": "Runs and their folders",
    "model": "Models",
    "weight_files": "Models",
    "export": "Models",
    "check": "Compiling",
    "compile": "Compiling",
    "contract.py": "Compiling",
    "sdk.py": "SDK and cards",
    "bundles": "SDK and cards",
    "cards": "SDK and cards",
    "engine": "SDK and cards",
    "worker": "SDK and cards",
    "doctor": "SDK and cards",
    "limits.py": "SDK and cards",
    "cluster": "Ray and clusters",
    "data": "Ray Data",
    "api": "Python",
    "serve": "The server",
    "telemetry": "Monitoring",
    "files": "Files and folders",
}
"""What somebody was doing where a sentence comes from, by the room of the code."""


class Said(NamedTuple):
    """A sentence of the code, whose error it is, and the room that says it."""

    text: str
    error: str
    room: str


def exit_codes_page() -> str:
    """docs/reference/exit-codes.md."""
    about = code_meanings()
    rows = [
        (code(str(each.value)), each.name, about[each.name], EXAMPLES[each]) for each in ExitCode
    ]
    same = "Stopped by this signal; a run goes on in the same way."
    signals = [
        (code(str(128 + number)), number.name, same, example) for number, example in SIGNALS.items()
    ]
    return page(
        "Exit codes",
        "`$?` holds the exit code of the last command in a shell. Every command keeps to these.",
        table(("code", "name", "meaning", "for example"), [*rows, *signals]),
        "After any other signal the code is 128 and the signal's number. "
        "`qaic-ray emulator run` ends with its program's own code.",
        section(
            "In a script",
            ["```sh", "until qaic-ray run --resume; do :; done", "```"],
            "This goes on with the last unfinished run until none is left. Ctrl-C ends the loop.",
        ),
    )


def code_meanings() -> dict[str, str]:
    """The text behind each member of `ExitCode`, in the source."""
    (tree,) = ast.parse(inspect.getsource(ExitCode)).body
    assert isinstance(tree, ast.ClassDef)
    said = {"DONE": "Done."}
    last = ""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            last = node.targets[0].id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last:
            said[last] = " ".join(str(node.value.value).split())
    return said


def errors_page() -> str:
    """docs/reference/errors.md."""
    found = sentences()
    titles = dict.fromkeys(ROOMS.values())
    by_title = {title: [s for s in found if ROOMS[s.room] == title] for title in titles}
    return page(
        "Errors",
        "An error is one sentence on stderr. It says what is wrong, and what to do. A wrong "
        "request ends with exit code 2, and nothing is half-written. `--debug` shows the "
        "traceback too. Find your sentence here with the search of the site. What stands in "
        "‹angle marks› is a name or a value of yours.",
        section(
            "Kinds of errors",
            "Programs in Python catch these classes of `qaic_ray.errors`.",
            table(("class", "meaning", "exit code"), _classes()),
        ),
        section(
            "Errors of one row",
            "`RowError` ends no run. Its row has the sentence as `error`: see [rows](rows.md).",
            _table([s for s in found if s.error == "RowError"], with_class=False),
        ),
        *(
            section(title, _table([s for s in said if s.error != "RowError"]))
            for title, said in by_title.items()
            if any(s.error != "RowError" for s in said)
        ),
        section(
            "Errors of the server",
            "A request that cannot be answered gets one of these statuses, and an object with "
            "`message`, `type`, `param` (the field that is wrong) and `code`.",
            table(
                ("status", "type", "meaning"),
                (
                    (code(str(status)), code(kind), told)
                    for status, (kind, told) in STATUSES.items()
                ),
            ),
        ),
    )


def _classes() -> Iterator[tuple[str, str, str]]:
    for kind in error_classes():
        if issubclass(kind, UsageError):
            ends = ExitCode.USAGE
        else:
            ends = ExitCode.UNFINISHED if kind in _GO_ON else ExitCode.FAILED
        text = inspect.getdoc(kind) or ""
        yield code(kind.__name__), text.partition("\n\n")[0], code(str(ends.value))


_GO_ON = (errors.Unfinished, errors.ClusterLost)


def error_classes() -> list[type[QaicRayError]]:
    """The classes of `qaic_ray.errors`, as they stand there."""
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type))
    return [kind for kind in kinds if issubclass(kind, QaicRayError)]


def _table(found: list[Said], *, with_class: bool = True) -> Iterator[str]:
    if not with_class:
        return table(("it says",), ((said.text,) for said in found))
    return table(("it says", "class"), ((said.text, code(said.error)) for said in found))


@cache
def sentences() -> list[Said]:
    """Every sentence that an error is made of in the code, in the order of rooms and files."""
    names = {kind.__name__ for kind in error_classes()}
    found: dict[str, Said] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room not in ROOMS:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = _constants(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                name = "UsageError" if name == "raises" else name  # the caller's kind of it
                text = _text(node.args[0], constants)
                if name in names and _is_sentence(text):
                    found.setdefault(text, Said(text, name, room))
    return list(found.values())


def _constants(tree: ast.Module) -> dict[str, str]:
    """Names of a module that stand for a text or a number."""
    return {
        target.id: str(node.value.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _is_sentence(text: str) -> bool:
    """More of it is said than filled in."""
    words = re.sub("‹.*?›", "", text).split()
    return len(words) > 3 and text[-1] in ".!?›"


def _text(node: ast.expr, constants: Mapping[str, str]) -> str:
    """A literal's text, with the names of what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _escaped(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        if isinstance(node.value, ast.Name) and node.value.id in constants:
            return _escaped(constants[node.value.id])
        return f"‹{_name(node.value)}›"
    return ""


def _name(node: ast.expr) -> str:
    """A word for what is filled in."""
    match node:
        case ast.Name(name):
            return _words(name)
        case ast.Attribute(_, name):
            return {"strerror": "reason", "__name__": "name"}.get(name, _words(name))
        case ast.Call(_, [first, *_]):
            return _name(first)
        case ast.Subscript(inner) | ast.Call(ast.Attribute(inner)) | ast.Await(inner):
            return _name(inner)
        case ast.BinOp(left):
            return _name(left)
    return "…"


def _words(name: str) -> str:
    return name.strip("_").replace("_", " ").lower()


def _escaped(text: str) -> str:
    """A text as Markdown shows it, but for what stands in the letters of code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([<>*_])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
