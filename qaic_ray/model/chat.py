"""Conversations to prompt texts, by transformers; and the child process that it runs in first.

A checkpoint's files and chat templates come from unknown authors, and a template is a program. In
the child they may hang, take all memory or end the process. So a tokenizer is loaded there, and a
template first rendered there. The child loads no torch, and this process transformers only with the
first conversation.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.folders import cache_folder
from qaic_ray.interruption import die_with_parent
from qaic_ray.rows import ChatOptions

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

RESERVED = frozenset(
    {
        *("conversation", "conversations", "messages", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "sanitize_control_tokens"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "self"),
    }
)
"""Parameters of `apply_chat_template`, which are not variables of a template."""

_moment: ContextVar[datetime | None] = ContextVar("moment of a run", default=None)


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat templates, and what they are rendered with; threads may share it.

    Args:
        templates: Jinja text; or several by name, of which `tool_use` is for conversations with
            tools and `default` for the others; None where the model is not a chat model.
        special_tokens: texts by name, like `bos_token`.
        moment: the time that a template is given (`strftime_now`); None: that of rendering.
    """

    templates: str | Mapping[str, str] | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    moment: datetime | None = None

    def of_run(self, template: str | None, date: str | None) -> ChatTemplate:
        """A copy with the run's template, where it has one, and with the run's date."""
        moment = None if date is None else datetime.fromisoformat(date)
        templates = self.templates if template is None else template
        return replace(self, templates=templates, moment=moment)

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The prompt text of a conversation, special tokens written out.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            options: the row's.

        Raises:
            UsageError: the model has no chat template, or its template refuses these messages.
        """
        template, variables = self.try_out(messages, options)
        from transformers.utils import chat_template_utils

        def rendered() -> str:
            _moment.set(self.moment)
            return str(
                _renderer().apply_chat_template(
                    list(messages), chat_template=template, tokenize=False, **variables
                )
            )

        # The library keeps what it compiled, and renders with that.
        try:
            compiled = chat_template_utils._compile_jinja_template(template)
            compiled.globals["strftime_now"] = _strftime
            return copy_context().run(rendered)
        except Exception as error:  # a template is a program: it may raise anything
            raise UsageError(
                f"The model's chat template refuses these messages: {_reason(error)}."
            ) from error

    def try_out(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions
    ) -> tuple[str, dict[str, Any]]:
        """Check that conversations can be rendered, with these messages as an example.

        A template is rendered in a child the first time; the cache folder remembers that.

        Returns:
            The template, and what `apply_chat_template` takes beside it.

        Raises:
            UsageError: the template does not compile, or takes too long; or there is none.
        """
        check_kwargs(options.template_kwargs)
        begins_answer = options.add_generation_prompt and not options.continue_final_message
        variables = {**self.special_tokens, **options.template_kwargs}
        variables["add_generation_prompt"] = begins_answer
        variables["continue_final_message"] = options.continue_final_message
        template = self._chosen(variables.get("tools"))
        task: dict[str, Any] = {"do": "render", "template": template, "variables": variables}
        task["messages"] = [dict(message) for message in messages]
        with _trying:
            if template not in _tried:
                _tried[template] = _why_never(template, task)
            reason = _tried[template]
        if reason is not None:
            raise UsageError(
                f"The model's chat template cannot be used: {reason}. Give another one "
                "(--chat-template FILE, run.chat_template), or send plain prompts."
            )
        return template, variables

    def _chosen(self, tools: object) -> str:
        templates = self.templates
        if isinstance(templates, str):
            return templates
        if not templates:
            raise UsageError(
                "This model has no chat template; send plain prompts, give one "
                "(--chat-template FILE, run.chat_template), or use an instruct model."
            )
        chosen = "tool_use" if tools is not None and "tool_use" in templates else "default"
        if chosen not in templates:
            raise UsageError(
                f"This model has several chat templates ({', '.join(sorted(templates))}) and none "
                "of them is the default: give one (--chat-template FILE, run.chat_template)."
            )
        return templates[chosen]


def check_kwargs(template_kwargs: Mapping[str, Any]) -> None:
    """Check that a template's variables have allowed names and are plain data.

    Raises:
        UsageError: one is a parameter of `apply_chat_template`, or not JSON.
    """
    if reserved := RESERVED.intersection(template_kwargs):
        raise UsageError(
            f"chat_template_kwargs holds {min(reserved)!r}, which is no variable of a template."
        )
    try:
        json.dumps(template_kwargs, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"chat_template_kwargs holds what is not JSON: {error}.") from error


@lru_cache(maxsize=1)
def _renderer() -> Any:
    """A tokenizer of the library's without tokens, which applies chat templates."""
    from transformers import PreTrainedTokenizerBase

    return PreTrainedTokenizerBase()


def _strftime(form: str) -> str:
    return (_moment.get() or datetime.now()).strftime(form)


_trying = threading.Lock()
_tried: dict[str, str | None] = {}  # template -> why it can never be rendered


def _why_never(template: str, task: dict[str, Any]) -> str | None:
    """Why a template can never be rendered; None where it can."""
    parts = [template, version("transformers"), version("jinja2")]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    mark = cache_folder() / "templates" / digest[:32]
    if mark.is_file():
        return None
    try:
        ask_child(task, RENDER_CPU_S)
    except ChildFailed as error:
        if error.is_final:
            return str(error)
    with suppress(OSError):  # without the mark, the next process renders it in a child again
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return None


# -- the child process


class ChildFailed(QaicRayError):
    """What the library raised; with `is_final` other messages would fail too."""

    def __init__(self, message: str, *, is_final: bool = True) -> None:
        super().__init__(message)
        self.is_final = is_final


def ask_child(task: dict[str, Any], cpu_s: int) -> None:
    """Have a child do `load` or `render`, within `cpu_s` of CPU time.

    - `load` writes what `AutoTokenizer` reads from the folder `folder` as tokenizer.json and
      settings.json in `output`; both are absolute.
    - `render` compiles a chat template and renders it, within `RENDER_BYTES` of memory.

    Raises:
        ChildFailed: with the library's message.
    """
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


def _reason(error: BaseException) -> str:
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
        return {"error": _reason(error), "is_final": task.get("step") != "rendering"}
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
    tokenizer.apply_chat_template(task["messages"], tokenize=False, **task["variables"])


def _limit_cpu(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
