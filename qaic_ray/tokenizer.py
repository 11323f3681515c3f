"""Text to token ids and back, and chat templates, from a checkpoint's own files.

Uses the `tokenizers` and `jinja2` libraries directly: a worker loads no torch and no transformers
for it. Knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer as Backend

TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The tokenizer of one checkpoint; threads may share it.

    Args:
        backend: the loaded `tokenizer.json`.
        settings: the checkpoint's `tokenizer_config.json`, special tokens as plain strings.
        chat_template: Jinja text, None where the model is not a chat model.
        eos_ids: ids that end an answer.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        settings: Mapping[str, Any],
        chat_template: str | None,
        eos_ids: tuple[int, ...],
    ) -> None:
        # A prompt is never cut or padded here: the engine refuses what does not fit.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._settings = settings
        self._chat_template = chat_template
        self._bos_id = backend.token_to_id(str(settings.get("bos_token")))
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.eos_ids = eos_ids

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones too (a model's logits may be wider)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be asked for."""
        return self._chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the beginning-of-text token where the model has one."""
        adds_bos = self._settings.get("add_bos_token")
        ids = self._backend.encode(text, add_special_tokens=adds_bos is not False).ids
        if adds_bos and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids.insert(0, self._bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens and with every space as the model wrote it."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary has it; None where it has no text: special, or unknown."""
        return None if token_id in self._special_ids else self._backend.id_to_token(token_id)

    @property
    def decoder_steps(self) -> list[dict[str, Any]]:
        """How pieces become text: the steps of tokenizer.json's `decoder`, one after the other."""
        decoder = self._backend.decoder
        return [] if decoder is None else _steps(json.loads(decoder.__getstate__()))

    def join(self, pieces: Sequence[str]) -> str:
        """The text of pieces, as `decode` makes it."""
        decoder = self._backend.decoder
        return " ".join(pieces) if decoder is None else decoder.decode(list(pieces))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Args:
            messages: `{"role": ..., "content": ...}` in order.

        Raises:
            UsageError: the model has no chat template, or its template refuses these messages.
        """
        return self._backend.encode(self.render_chat(messages), add_special_tokens=False).ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a conversation, special tokens written out."""
        if self._chat_template is None:
            raise UsageError(
                "This model has no chat template; send plain prompts, or use an instruct model."
            )
        tokens = {name: self._settings.get(name) for name in SPECIAL_TOKENS}
        return _render(
            self._chat_template, messages=list(messages), add_generation_prompt=True, **tokens
        )


def open_tokenizer(folder: Path, eos_ids: tuple[int, ...]) -> Tokenizer:
    """Read the tokenizer files of a folder that has a `tokenizer.json`.

    Raises:
        CheckpointError: the file is missing or is not a tokenizer.
    """
    path = folder / TOKENIZER_FILE
    return Tokenizer(
        _read_backend(path),
        settings=read_settings(folder),
        chat_template=_read_chat_template(folder),
        eos_ids=eos_ids,
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` over `special_tokens_map.json`, special tokens as plain strings."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            settings |= read_json(path)
    for name in SPECIAL_TOKENS:
        token = settings.get(name)
        if isinstance(token, dict):
            settings[name] = token.get("content")
    return settings


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file, or one sentence that names the file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return document


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _read_backend(path: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"Cannot read the tokenizer {path}: {error.strerror}.") from error
    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer of this format: {error}.") from error


def _read_chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = read_settings(folder).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _render(template: str, **values: Any) -> str:
    from jinja2 import TemplateError

    try:
        return _compiled(template).render(**values)
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as e:
        # A template is a program of the checkpoint: whatever it stumbles over, it says no.
        raise UsageError(f"The model's chat template refuses these messages: {e}.") from e


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """Compile as transformers does: in a sandbox, since the text comes from the checkpoint."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | options))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
