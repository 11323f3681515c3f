"""Text to token ids and back, and conversations to ids, as transformers' tokenizer does it.

Uses the `tokenizers` library directly: a worker loads no torch, and transformers only for
conversations. Knows nothing of weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.documents import read_object, read_text
from qaic_ray.errors import CheckpointError, RowError
from qaic_ray.model.chat import ChatTemplate
from qaic_ray.model.transformers_child import SETTINGS_FILE, TOKENIZER_FILE
from qaic_ray.rows import ChatOptions

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_CLEANED = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


class Tokenizer:
    """The tokenizer of one checkpoint; threads may share it.

    Args:
        backend: the loaded `tokenizer.json`.
        settings: what that file does not hold, in transformers' names: `special_tokens_map`,
            `split_special_tokens`, `clean_up_tokenization_spaces`.
        chat_template: Jinja text, or several with names; None where the model is not a chat model.
        eos_ids: ids that end an answer; where there are none, that of the `eos_token`.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        settings: Mapping[str, Any],
        chat_template: str | Mapping[str, str] | None,
        eos_ids: tuple[int, ...],
    ) -> None:
        # A prompt is never cut or padded here: the engine refuses what does not fit.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
        self._backend = backend
        self._cleans_up = bool(settings.get("clean_up_tokenization_spaces"))
        special_tokens = settings.get("special_tokens_map", {})
        self.chat_template = ChatTemplate(chat_template, special_tokens)
        added = backend.get_added_tokens_decoder()
        self._special = {id_: token.content for id_, token in added.items() if token.special}
        eos_id = backend.token_to_id(special_tokens.get("eos_token", ""))
        self.eos_ids = eos_ids or (() if eos_id is None else (eos_id,))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones too (a model's logits may be wider)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be asked for."""
        return bool(self.chat_template.templates)

    def of_run(self, chat_template: str | None, date: str | None) -> Tokenizer:
        """The same with a chat template of the run's, where there is one, and with its date."""
        other = copy.copy(self)
        other.chat_template = self.chat_template.of_run(chat_template, date)
        return other

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the beginning-of-text token where the model has one.

        Raises:
            RowError: for a text that is no Unicode.
        """
        return self._encode(text, adds_special=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        text = self._backend.decode(ids, skip_special_tokens=True)
        return _cleaned(text) if self._cleans_up else text

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary has it; None where it has no text: special, or unknown."""
        return None if token_id in self._special else self._backend.id_to_token(token_id)

    def special_text(self, token_id: int) -> str | None:
        """How a special token is written; None for any other token."""
        return self._special.get(token_id)

    def writes_special(self, text: str) -> bool:
        """Whether a special token is written out in `text`."""
        return any(token in text for token in self._special.values())

    @property
    def decoder_steps(self) -> list[dict[str, Any]]:
        """How pieces become text: the steps of tokenizer.json's `decoder`, one after the other."""
        decoder = self._backend.decoder
        steps = [] if decoder is None else _steps(json.loads(decoder.__getstate__()))
        return [*steps, {"type": "CleanUp"}] if self._cleans_up else steps

    def join(self, pieces: Sequence[str]) -> str:
        """The text of pieces, as `decode` makes it."""
        decoder = self._backend.decoder
        text = " ".join(pieces) if decoder is None else decoder.decode(list(pieces))
        return _cleaned(text) if self._cleans_up else text

    def chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None
    ) -> list[int]:
        """Token ids of a conversation; see `render_chat`."""
        return self._encode(self.render_chat(messages, options), adds_special=False)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None
    ) -> str:
        """The prompt text of a conversation, special tokens written out.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            options: None: ready for the assistant's answer.

        Raises:
            UsageError: the model has no chat template, or its template refuses these messages.
        """
        return self.chat_template.render(messages, options or ChatOptions())

    def _encode(self, text: str, *, adds_special: bool) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=adds_special).ids
        except (TypeError, UnicodeError) as error:
            raise RowError(
                "The prompt holds half of a surrogate pair (like \\ud83d alone), which is no text."
            ) from error


def open_tokenizer(folder: Path, eos_ids: tuple[int, ...]) -> Tokenizer:
    """Read a folder that `transformers_child.load` wrote.

    Raises:
        CheckpointError: the folder is damaged.
    """
    settings = _read_settings(folder)
    return Tokenizer(
        _read_backend(folder / TOKENIZER_FILE),
        settings=settings,
        chat_template=settings.get("chat_template"),
        eos_ids=eos_ids,
    )


def open_chat_template(folder: Path) -> ChatTemplate:
    """The chat templates of such a folder, without its tokens."""
    settings = _read_settings(folder)
    return ChatTemplate(settings.get("chat_template"), settings.get("special_tokens_map", {}))


def _read_settings(folder: Path) -> dict[str, Any]:
    return read_object(folder / SETTINGS_FILE, raises=CheckpointError)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _cleaned(text: str) -> str:
    """The text without spaces before marks, which tokenizers of words put there."""
    for spaced, plain in _CLEANED:
        text = text.replace(spaced, plain)
    return text


def _read_backend(path: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    text = read_text(path, raises=CheckpointError)
    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer of this format: {error}.") from error
