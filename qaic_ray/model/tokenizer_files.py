"""A checkpoint folder's tokenizer files, as transformers' `AutoTokenizer` reads them; kept.

A folder may say in ten files, old and new, what its tokens are. What the library makes of them is
kept in the cache folder under the content of all that it may have read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qaic_ray.documents import checked, read_object, read_text
from qaic_ray.errors import CheckpointError
from qaic_ray.folders import building, cache_folder, locked
from qaic_ray.model import transformers_child
from qaic_ray.model.transformers_child import SETTINGS_FILE, TOKENIZER_FILE

FORMAT = 1
"""Raised when what is kept changes, so that what older versions kept is not found."""

_VOCABULARIES = (TOKENIZER_FILE, "vocab.json", "vocab.txt", "tekken.json")
_VOCABULARY_SUFFIX = ".model"  # tokenizer.model, spiece.model, tiktoken.model
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_FOR_PEOPLE = (".md", ".png", ".jpg", ".pdf", ".log")
_TEMPLATE_FOLDER = "additional_chat_templates"
_PROCESSOR_TEMPLATE = "chat_template.json"
_MAX_BYTES = 256 * 2**20  # no file of a tokenizer is longer


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder comes with any tokenizer files."""
    return any((folder / name).is_file() for name in _VOCABULARIES) or any(
        path.is_file() for path in folder.glob(f"*{_VOCABULARY_SUFFIX}*")
    )


def text_parts(folder: Path) -> dict[str, str]:
    """What a checkpoint folder's text depends on, by content: names to digests and versions.

    `text` is the SHA-256 over all files that a tokenizer and chat templates may come from, which
    are all but weights and what people read; the others are the versions of the libraries.

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


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over all that `loaded_tokenizer` makes something of."""
    return hashlib.sha256(json.dumps([FORMAT, text_parts(folder)]).encode()).hexdigest()


def loaded_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Path:
    """The folder in the cache with a checkpoint's tokenizer, for `open_tokenizer`.

    Args:
        folder: the checkpoint's.
        trust_remote_code: let transformers run a tokenizer's own code from the checkpoint.

    Raises:
        CheckpointError: the library cannot read it; with the file and the key where that is known.
    """
    if not trust_remote_code and not has_vocabulary(folder):
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILE} and no tokenizer.model; add the tokenizer files of "
            "the model."
        )
    key = tokenizer_digest(folder)[:32] + ("-code" if trust_remote_code else "")
    kept = cache_folder() / "tokenizers" / key
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


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids of the token that ends an answer, by a checkpoint's own tokenizer.json."""
    token: Any = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            token = read_object(path, raises=CheckpointError).get("eos_token", token)
    if isinstance(token, dict):
        token = token.get("content")
    path = folder / TOKENIZER_FILE
    if not isinstance(token, str) or not path.is_file():
        return ()
    added = read_object(path, raises=CheckpointError).get("added_tokens") or []
    kind = list[dict[str, Any]]
    entries = checked(kind, added, f"{path}: added_tokens", raises=CheckpointError)
    return tuple(
        entry["id"]
        for entry in entries
        if entry.get("content") == token and isinstance(entry.get("id"), int)
    )


def _is_whole(kept: Path) -> bool:
    try:
        settings = json.loads((kept / SETTINGS_FILE).read_bytes())
        return bool(settings["tokenizer_bytes"] == os.path.getsize(kept / TOKENIZER_FILE))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _load(folder: Path, fresh: Path, *, trust_remote_code: bool) -> None:
    try:
        transformers_child.load(folder, fresh, trust_remote_code=trust_remote_code)
    except transformers_child.ChildFailed as error:
        _name_what_is_odd(folder)
        lacking = _missing_library(folder)
        if lacking:
            raise CheckpointError(
                f"The tokenizer of {folder} is a {_VOCABULARY_SUFFIX} file, and reading it needs "
                f"{lacking}: pip install 'qaic-ray[sentencepiece]'."
            ) from error
        raise CheckpointError(
            f"transformers cannot read the tokenizer of {folder}: {error}."
        ) from error
    settings = read_object(fresh / SETTINGS_FILE, raises=CheckpointError)
    if settings["chat_template"] is None:
        settings["chat_template"] = _processor_template(folder)
    checked(
        str | dict[str, str] | None,  # type: ignore[arg-type]
        settings["chat_template"],
        f"{folder}: chat_template",
        raises=CheckpointError,
    )
    settings["tokenizer_bytes"] = os.path.getsize(fresh / TOKENIZER_FILE)
    (fresh / SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")


def _processor_template(folder: Path) -> str | None:
    """The chat template that older versions of transformers kept for a model with images."""
    path = folder / _PROCESSOR_TEMPLATE
    if not path.is_file():
        return None
    template = read_object(path, raises=CheckpointError).get("chat_template")
    return template if isinstance(template, str) else None


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
    """Raise CheckpointError for the file that the library stumbled over, if it can be told."""
    for name, kind in _OBJECTS.items():
        path = folder / name
        if path.is_file():
            document = read_object(path, raises=CheckpointError)
            checked(kind, document, str(path), raises=CheckpointError)
            if name == "tokenizer_config.json":
                _check_settings(document, path)
    for path in (folder / "chat_template.jinja", *folder.glob(f"{_TEMPLATE_FOLDER}/*.jinja")):
        if path.is_file():
            read_text(path, raises=CheckpointError)


def _check_settings(document: dict[str, Any], path: Path) -> None:
    for key, kind in _SETTINGS.items():
        if key in document:
            checked(kind, document[key], f"{path}: {key}", raises=CheckpointError)
