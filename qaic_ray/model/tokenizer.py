"""Text to token ids and back, and conversations to ids, as transformers' tokenizer does it.

The `tokenizers` library does the work, so a worker loads no torch, and transformers only for
conversations. A folder may describe its tokens in ten files, old and new; a child process has
transformers read them, and the result is kept in the cache folder under the digest of all of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import CheckpointError, RowError
from qaic_ray.files.documents import checked, read_object, read_text
from qaic_ray.files.folders import building, cache_folder, locked
from qaic_ray.model import chat
from qaic_ray.model.chat import SETTINGS_FILE, TOKENIZER_FILE, ChatTemplate
from qaic_ray.rows import ChatOptions

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

FORMAT = 1
"""Raised when the kept files change, so that what older versions kept is not found."""

_VOCABULARIES = (TOKENIZER_FILE, "vocab.json", "vocab.txt", "tekken.json")
_VOCABULARY_SUFFIX = ".model"  # tokenizer.model, spiece.model, tiktoken.model
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_FOR_PEOPLE = (".md", ".png", ".jpg", ".pdf", ".log")
_TEMPLATE_FOLDER = "additional_chat_templates"
_PROCESSOR_TEMPLATE = "chat_template.json"  # older transformers', of a model with images
_MAX_BYTES = 256 * 2**20  # no file of a tokenizer is longer

_CLEANED = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


class Tokenizer:
    """The tokenizer of one checkpoint; threads may share it.

    Args:
        backend: the loaded `tokenizer.json`.
        settings: what that file does not hold, by transformers' names: `special_tokens_map`,
            `split_special_tokens`, `clean_up_tokenization_spaces`, and `chat_template`, which is a
            Jinja text, several with names, or None.
        eos_ids: ids that end an answer; where there are none, that of the `eos_token`.
    """

    def __init__(
        self, backend: Backend, settings: Mapping[str, Any], eos_ids: tuple[int, ...]
    ) -> None:
        # A prompt is never cut or padded here: the engine refuses what does not fit.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
        self._backend = backend
        self._cleans_up = bool(settings.get("clean_up_tokenization_spaces"))
        special_tokens = settings.get("special_tokens_map", {})
        self.chat_template = ChatTemplate(settings.get("chat_template"), special_tokens)
        added = backend.get_added_tokens_decoder()
        self.special = {id_: token.content for id_, token in added.items() if token.special}
        """Special tokens written out, by their ids."""
        self.added_tokens = {token.content: id_ for id_, token in added.items()}
        """Ids of special and other added tokens, by their texts."""
        eos_id = backend.token_to_id(special_tokens.get("eos_token", ""))
        self.eos_ids = eos_ids or (() if eos_id is None else (eos_id,))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones too (a model's logits may be wider)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def json_text(self) -> str:
        """All of it, in the form of a `tokenizer.json`."""
        return str(self._backend.to_str())

    def of_run(self, chat_template: str | None, date: str | None) -> Tokenizer:
        """A copy with the run's chat template, where it has one, and its date."""
        other = copy.copy(self)
        other.chat_template = self.chat_template.of_run(chat_template, date)
        return other

    def encode(self, text: str, *, adds_special: bool = True) -> list[int]:
        """Token ids of `text`, with the beginning-of-text token where the model has one.

        Raises:
            RowError: for a text that is no Unicode.
        """
        try:
            return self._backend.encode(text, add_special_tokens=adds_special).ids
        except (TypeError, UnicodeError) as error:
            raise RowError(
                "The prompt holds half of a surrogate pair (like \\ud83d alone), which is no text."
            ) from error

    def decode(self, ids: Sequence[int], *, skips_special: bool = True) -> str:
        """The text of `ids`, without special tokens or with them written out."""
        text = self._backend.decode(ids, skip_special_tokens=skips_special)
        return _cleaned(text) if self._cleans_up else text

    def piece(self, token_id: int, *, skips_special: bool = True) -> str | None:
        """A token as the vocabulary has it; None for one that no text shows."""
        is_skipped = skips_special and token_id in self.special
        return None if is_skipped else self._backend.id_to_token(token_id)

    @property
    def decoder_steps(self) -> list[dict[str, Any]]:
        """The steps of tokenizer.json's `decoder`, which make text of pieces, in order."""
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
        """Token ids of a conversation; see `ChatTemplate.render`."""
        text = self.chat_template.render(messages, options or ChatOptions())
        return self.encode(text, adds_special=False)


def open_tokenizer(folder: Path, eos_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer in a folder that `loaded_tokenizer` made.

    Raises:
        CheckpointError: the folder is damaged.
    """
    from tokenizers import Tokenizer as Backend

    path = folder / TOKENIZER_FILE
    text = read_text(path, raises=CheckpointError)
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer of this format: {error}.") from error
    return Tokenizer(backend, _read_settings(folder), eos_ids)


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


# -- the files of a checkpoint


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has any tokenizer files."""
    return any((folder / name).is_file() for name in _VOCABULARIES) or any(
        path.is_file() for path in folder.glob(f"*{_VOCABULARY_SUFFIX}*")
    )


def text_parts(folder: Path) -> dict[str, str]:
    """Digests and versions of what the text of a checkpoint depends on.

    `text` is the SHA-256 over all files that a tokenizer or chat template may come from: all except
    weights and what people read. The others are the versions of the libraries.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        inner = folder / _TEMPLATE_FOLDER
        for path in [*sorted(folder.iterdir()), *sorted(inner.glob("*.jinja"))]:
            if not path.is_file() or path.suffix in _WEIGHTS or path.suffix in _FOR_PEOPLE:
                continue
            size = path.stat().st_size
            content = hashlib.sha256(path.read_bytes() if size <= _MAX_BYTES else b"").hexdigest()
            entry = [str(path.relative_to(folder)), size, content]
            digest.update(json.dumps(entry).encode())
    except OSError as error:
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be read: {error.strerror} ({error.filename})."
        ) from error
    versions = {name: version(name) for name in ("transformers", "tokenizers")}
    return {"text": digest.hexdigest(), **versions}


def loaded_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Path:
    """The cache folder of a checkpoint's tokenizer, for `open_tokenizer`; made at the first call.

    Args:
        folder: the checkpoint's.
        trust_remote_code: let transformers run a tokenizer's own code from the checkpoint.

    Raises:
        CheckpointError: the library cannot read it; it names the file and the key where they are
            known.
    """
    if not trust_remote_code and not has_vocabulary(folder):
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILE} and no tokenizer.model; add the tokenizer files of "
            "the model."
        )
    digest = hashlib.sha256(json.dumps([FORMAT, text_parts(folder)]).encode()).hexdigest()
    kept = cache_folder() / "tokenizers" / (digest[:32] + ("-code" if trust_remote_code else ""))
    try:
        with locked(kept):
            if not _is_whole(kept):
                with building(kept) as fresh:
                    _load(folder, fresh, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise CheckpointError(
            f"The tokenizer of {folder} cannot be kept in {kept.parent}: {error.strerror}; set "
            "QAIC_RAY_CACHE to a folder that can be written."
        ) from error
    return kept


def transformers_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' own tokenizer of a checkpoint, for programs that want one.

    Raises:
        CheckpointError: the library cannot read it.
    """
    from transformers import AutoTokenizer

    loaded_tokenizer(folder, trust_remote_code=trust_remote_code)  # says what is wrong with it
    return AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code
    )


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids of the token that ends an answer, by a checkpoint's tokenizer.json."""
    token: Any = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        token = object_if_there(folder / name).get("eos_token", token)
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return ()
    path = folder / TOKENIZER_FILE
    added = object_if_there(path).get("added_tokens") or []
    kind = list[dict[str, Any]]
    entries = checked(kind, added, f"{path}: added_tokens", raises=CheckpointError)
    ids = [entry.get("id") for entry in entries if entry.get("content") == token]
    return tuple(id_ for id_ in ids if isinstance(id_, int))


def object_if_there(path: Path) -> dict[str, Any]:
    """The JSON object that a file of a checkpoint holds; an empty one where there is no file."""
    return read_object(path, raises=CheckpointError) if path.is_file() else {}


def _is_whole(kept: Path) -> bool:
    try:
        settings = json.loads((kept / SETTINGS_FILE).read_bytes())
        return bool(settings["tokenizer_bytes"] == os.path.getsize(kept / TOKENIZER_FILE))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _load(folder: Path, fresh: Path, *, trust_remote_code: bool) -> None:
    try:
        task: dict[str, Any] = {"do": "load", "trust_remote_code": trust_remote_code}
        task |= {"folder": str(folder.absolute()), "output": str(fresh.absolute())}
        chat.ask_child(task, chat.LOAD_CPU_S)
    except chat.ChildFailed as error:
        _name_what_is_odd(folder)
        if lacking := _missing_library(folder):
            raise CheckpointError(
                f"The tokenizer of {folder} is a {_VOCABULARY_SUFFIX} file, and reading it needs "
                f"{lacking}: pip install 'qaic-ray[sentencepiece]'."
            ) from error
        raise CheckpointError(
            f"transformers cannot read the tokenizer of {folder}: {error}."
        ) from error
    settings = read_object(fresh / SETTINGS_FILE, raises=CheckpointError)
    if settings["chat_template"] is None:
        template = object_if_there(folder / _PROCESSOR_TEMPLATE).get("chat_template")
        settings["chat_template"] = template if isinstance(template, str) else None
    checked(
        str | dict[str, str] | None,  # type: ignore[arg-type]
        settings["chat_template"],
        f"{folder}: chat_template",
        raises=CheckpointError,
    )
    settings["tokenizer_bytes"] = os.path.getsize(fresh / TOKENIZER_FILE)
    (fresh / SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")


def _missing_library(folder: Path) -> str:
    if (folder / TOKENIZER_FILE).is_file() or not list(folder.glob(f"*{_VOCABULARY_SUFFIX}*")):
        return ""
    missing = [name for name in ("sentencepiece", "tiktoken") if find_spec(name) is None]
    return " and ".join(missing)


@dataclass(frozen=True)
class _NamedTemplate:
    name: str
    template: str


_Token = str | dict[str, Any] | None
_OBJECTS: dict[str, Any] = {
    "config.json": dict[str, Any],
    "tokenizer_config.json": dict[str, Any],
    "special_tokens_map.json": dict[str, _Token | list[_Token] | dict[str, _Token]],
    "added_tokens.json": dict[str, int],
    TOKENIZER_FILE: dict[str, Any],
}
_SETTINGS: dict[str, Any] = {
    "added_tokens_decoder": dict[int, dict[str, Any]],
    "chat_template": str | list[_NamedTemplate] | dict[str, str] | None,
    "extra_special_tokens": list[_Token] | dict[str, _Token] | None,
    "additional_special_tokens": list[_Token] | None,
    "tokenizer_class": str | None,
} | {f"{name}_token": _Token for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}


def _name_what_is_odd(folder: Path) -> None:
    """Raise CheckpointError for the file that the library failed at, if it can be found."""
    for name, kind in _OBJECTS.items():
        path = folder / name
        document = checked(kind, object_if_there(path), str(path), raises=CheckpointError)
        if name == "tokenizer_config.json":
            for key in filter(document.__contains__, _SETTINGS):
                checked(_SETTINGS[key], document[key], f"{path}: {key}", raises=CheckpointError)
    for path in (folder / "chat_template.jinja", *folder.glob(f"{_TEMPLATE_FOLDER}/*.jinja")):
        if path.is_file():
            read_text(path, raises=CheckpointError)
