"""Runs transformers in a child process, to load tokenizers and to render chat templates first.

A checkpoint's files and templates come from unknown authors. In the child they may hang, take all
memory or end the process. The child loads no torch.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.interruption import die_with_parent

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "settings.json"
# The slowest known tokenizer, 256,000 SentencePiece pieces without merges, takes a tenth of this.
LOAD_CPU_S = 900
RENDER_CPU_S = 10
RENDER_BYTES = 2**30  # beyond the libraries
MAX_CHARS = 300  # of a library's message

_WALL_FACTOR = 30  # of CPU to wall time: the machine may be busy, and imports come first
# A tokenizer needs neither. AutoTokenizer would load the first, which takes two seconds, and return
# a tokenizer of the second's own kind.
_NOT_LOADED = ("torch", "mistral_common")
_CLEANS_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


class ChildFailed(QaicRayError):
    """What the library raised; with `is_final` other messages would fail too."""

    def __init__(self, message: str, *, is_final: bool = True) -> None:
        super().__init__(message)
        self.is_final = is_final


def load(folder: Path, output: Path, *, trust_remote_code: bool) -> None:
    """Write what `AutoTokenizer` reads from a folder as tokenizer.json and settings.json.

    Raises:
        ChildFailed: with the library's message.
    """
    task = {"folder": str(folder.absolute()), "output": str(output.absolute())}
    _ask({"do": "load", **task, "trust_remote_code": trust_remote_code}, LOAD_CPU_S)


def render(
    template: str,
    messages: list[Any],
    variables: dict[str, Any],
    *,
    continue_final: bool,
    cpu_s: int = RENDER_CPU_S,
) -> None:
    """Compile a chat template and render it, within `cpu_s` and `RENDER_BYTES`.

    Raises:
        ChildFailed: with the library's message.
    """
    task = {"template": template, "messages": messages, "variables": variables}
    _ask({"do": "render", **task, "continue_final": continue_final}, cpu_s)


def _ask(task: dict[str, Any], cpu_s: int) -> None:
    paths = [os.path.abspath(path) for path in sys.path if path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", f"import {__name__} as child; child.main()"]
    slow = ChildFailed(f"it takes more than {cpu_s} s")
    given = json.dumps(task | {"parent": os.getpid(), "cpu_s": cpu_s})
    try:
        result = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            env=environment,
            cwd="/",  # so that no file in the user's folder is imported
            timeout=cpu_s * _WALL_FACTOR,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise slow from None
    except OSError as error:
        raise UsageError(
            f"transformers could not be started in a child process: {error.strerror}."
        ) from error
    if result.returncode == -signal.SIGXCPU:
        raise slow
    if result.returncode == -signal.SIGKILL:
        raise ChildFailed("its process was killed, as the system does when memory is short")
    if result.returncode != 0:
        said = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
        raise ChildFailed(said[0][:MAX_CHARS])
    answer = json.loads(result.stdout)
    if answer is not None:
        raise ChildFailed(answer["error"], is_final=answer["is_final"])


def reason(error: BaseException) -> str:
    """A library's message on one line, cut where it is long, without a full stop."""
    text = " ".join(str(error).split()).rstrip(".")
    if not text or isinstance(error, (LookupError, TypeError, AttributeError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}..."


# -- in the child


def main() -> None:
    """Do the task that stdin holds, and write the result to stdout."""
    task = json.load(sys.stdin)
    die_with_parent(task["parent"])
    answers = os.dup(1)
    os.dup2(2, 1)  # a library may print to stdout
    for name in _NOT_LOADED:
        if not task.get("trust_remote_code"):
            sys.modules[name] = None  # type: ignore[assignment]
    os.write(answers, json.dumps(_failure(task)).encode())
    os._exit(0)


def _failure(task: dict[str, Any]) -> dict[str, Any] | None:
    """Do a task; return None, or the arguments of the ChildFailed to raise."""
    try:
        {"load": _load, "render": _render}[task["do"]](task)
    except MemoryError:
        return {"error": "it takes more memory than there is for it", "is_final": True}
    except BaseException as error:  # noqa: BLE001  # a panic of the Rust library is no Exception
        return {"error": reason(error), "is_final": task.get("step") != "rendering"}
    return None


def _load(task: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    _limit_cpu(task["cpu_s"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            task["folder"], local_files_only=True, trust_remote_code=task["trust_remote_code"]
        )
    except BaseException:
        _check_tokenizer_file(Path(task["folder"]) / TOKENIZER_FILE)
        raise
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no fast form")
    cleans_up = bool(tokenizer.clean_up_tokenization_spaces) and (
        type(backend.model).__name__ != "BPE"
        or getattr(tokenizer, _CLEANS_BPE, True)  # before 5.4 there was no such distinction
    )
    settings = {
        "special_tokens_map": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "clean_up_tokenization_spaces": cleans_up,
    }
    output = Path(task["output"])
    (output / TOKENIZER_FILE).write_text(backend.to_str(), encoding="utf-8")
    (output / SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")


def _check_tokenizer_file(path: Path) -> None:
    import tokenizers

    if not path.is_file():
        return
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        raise ValueError(f"{path.name} is not a tokenizer of this format: {error}") from error


def _render(task: dict[str, Any]) -> None:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    tokenizer = PreTrainedTokenizerBase(chat_template=task["template"])
    _limit_cpu(task["cpu_s"])
    with open("/proc/self/statm") as pages:
        used = int(pages.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + RENDER_BYTES
    if most == resource.RLIM_INFINITY or limit < most:
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    chat_template_utils._compile_jinja_template(task["template"])
    task["step"] = "rendering"
    tokenizer.apply_chat_template(
        task["messages"],
        tokenize=False,
        continue_final_message=task["continue_final"],
        **task["variables"],
    )


def _limit_cpu(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
