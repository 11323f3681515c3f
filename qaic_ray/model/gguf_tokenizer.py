"""Makes the tokenizer files of a checkpoint from the vocabulary of a GGUF file.

A text gets the ids that llama.cpp gives it. A vocabulary whose way of splitting text is not in the
table here is refused by its name, because a wrong split gives wrong ids without an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import CheckpointError
from qaic_ray.files.documents import shown
from qaic_ray.model.gguf_file import GgufFile, GgufKeys

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PREFIX = "tokenizer.ggml."
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
MAX_TOKEN_CHARS = 2048
"""The longest token or merge."""
END_OF_TURN = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>",
    "<end_of_turn>", "<|end_of_turn|>", "[EOT]", "< EOT >",
})  # fmt: skip

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Splitting:
    """How text is split before bytes are merged, one pattern after the other.

    With `whole_words` a piece that is a token is not split by merges. `adds_bos` holds where the
    file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


_OF_LLAMA3 = Splitting((_LLAMA3,), whole_words=True, adds_bos=True)
_OF_DIGITS = Splitting((r"\p{N}", _GPT2))
_OF_QWEN2 = Splitting((_QWEN2,))
_OF_GPT2 = Splitting((_GPT2,))

SPLITTINGS = {
    "default": Splitting(_DEFAULT),
    "falcon": Splitting(_FALCON),
    "tekken": Splitting((_TEKKEN,), whole_words=True, adds_bos=True),
    "dbrx": Splitting((_LLAMA3,)),
    "smaug-bpe": Splitting((_LLAMA3,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _OF_LLAMA3),
    **dict.fromkeys(
        ("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b"),
        _OF_DIGITS,
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _OF_QWEN2),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), _OF_GPT2),
}
"""By `tokenizer.ggml.pre`; a test compares each with llama.cpp."""


def write_tokenizer(gguf: GgufFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, or nothing where the file has no vocabulary.

    Raises:
        CheckpointError: the vocabulary is damaged or of a kind that we do not run.
    """
    model, name = gguf.keys.get("tokenizer.ggml.model", "none"), gguf.name
    if model in ("none", "no_vocab"):
        return
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{name} has a tokenizer of the kind {shown(model)} (tokenizer.ggml.model); supported: "
            "gpt2, llama."
        )
    vocabulary = _Vocabulary(gguf)
    tokenizer = _byte_level(vocabulary) if model == "gpt2" else _sentencepiece(vocabulary)
    try:
        _finish(tokenizer, vocabulary)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"The special tokens of {name} cannot be used: {error}.") from error
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.dumps(_settings(vocabulary, gguf), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")


def end_ids(gguf: GgufFile) -> tuple[int, ...]:
    """Ids that end an answer: those the file names, and control tokens known to end a turn.

    Raises:
        CheckpointError: one of them is no token.
    """
    keys = GgufKeys(gguf, _PREFIX)
    tokens = keys.get("tokens", [])
    named = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [id_ for id_ in (_special_id(keys, key) for key in named) if id_ is not None]
    for number, kind in enumerate(keys.get("token_type", [])[: len(tokens)]):
        if kind == CONTROL and tokens[number] in END_OF_TURN:
            found.append(number)
    return tuple(dict.fromkeys(found))


_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Names of transformers, and keys."""
_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
"""What llama.cpp takes for a SentencePiece vocabulary that does not say."""


def _special_id(keys: GgufKeys, key: str) -> int | None:
    default = _SENTENCEPIECE_IDS.get(key) if keys.get("model") == "llama" else None
    number: Any = keys.get(key, default)
    num_tokens = len(keys.get("tokens", []))
    if number is not None and (type(number) is not int or not 0 <= number < max(num_tokens, 1)):
        raise keys.error(key, f"below the number of tokens, {num_tokens}")
    return number


class _Vocabulary(GgufKeys):
    """The checked lists of a file's tokenizer, which is of the kind gpt2 or llama."""

    def __init__(self, gguf: GgufFile) -> None:
        super().__init__(gguf, _PREFIX)
        self.tokens = self.texts("tokens")
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for token in self.tokens if self.tokens.count(token) > 1)
            raise CheckpointError(f"{self.name} has the token {shown(twice)} twice.")
        self.kinds = self.get("token_type", [1] * len(self.tokens))
        if not isinstance(self.kinds, list) or len(self.kinds) != len(self.tokens):
            raise CheckpointError(
                f"{self.name} has {len(self.tokens)} tokens and another number of types "
                "(tokenizer.ggml.token_type)."
            )
        ids = ((named, _special_id(self, key)) for named, key in _SPECIAL.items())
        self.special = {named: self.tokens[id_] for named, id_ in ids if id_ is not None}
        by_default = self.get("model") == "llama" or self.splitting.adds_bos
        self.before = self._around("bos_token", by_default=by_default)
        self.after = self._around("eos_token", by_default=False)

    @property
    def splitting(self) -> Splitting:
        """How the text of a byte-level vocabulary is split."""
        pre = self.get("pre", "default")
        if not isinstance(pre, str) or pre not in SPLITTINGS:
            raise CheckpointError(
                f"{self.name} splits text as {shown(pre)} (tokenizer.ggml.pre), which is not "
                "supported; convert the original checkpoint's folder instead."
            )
        return SPLITTINGS[pre]

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        texts = self.get(key)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise CheckpointError(f"{self.name} has no list of texts tokenizer.ggml.{key}.")
        for number, text in enumerate(texts):
            if len(text) > MAX_TOKEN_CHARS:
                raise CheckpointError(
                    f"{self.name} has an entry of more than {MAX_TOKEN_CHARS} characters in "
                    f"tokenizer.ggml.{key}."
                )
            if not _is_utf8(text):
                raise CheckpointError(
                    f"{self.name} has an entry in tokenizer.ggml.{key} that is not UTF-8: number "
                    f"{number}."
                )
        return texts

    def _around(self, named: str, *, by_default: bool) -> list[str]:
        """The special token that is put before or after every text, if any."""
        is_added = self.flag(f"add_{named}", default=by_default)
        return [self.special[named]] if is_added and named in self.special else []


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    splitting = vocabulary.splitting
    ids, merges = vocabulary.ids, []
    for merge in vocabulary.texts("merges"):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"{vocabulary.name} has a merge {shown(merge)} whose parts or result are no tokens."
            )
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=splitting.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(text), "isolated") for text in splitting.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = vocabulary.get("scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(vocabulary.tokens)
        or not all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores)
    ):
        raise CheckpointError(
            f"{vocabulary.name} has no number for each token (tokenizer.ggml.scores)."
        )
    model = models.BPE(
        vocabulary.ids,
        _merges(vocabulary.ids, scores),
        unk_token=vocabulary.special.get("unk_token"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = vocabulary.flag("add_space_prefix", default=True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] * prefix)])
    return tokenizer


def _merges(ids: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best-scored token first."""
    found = []
    for token, number in ids.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                found.append((-scores[number], ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _finish(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Set the tokens that are found before a text is split, and those put around a text."""
    from tokenizers import AddedToken, processors

    whole = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=whole[kind], normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
            if kind in whole and token
        ]
    )
    before, after = vocabulary.before, vocabulary.after
    if before or after:
        ids = vocabulary.ids
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, ids[token]) for token in {*before, *after}],
        )


def _settings(vocabulary: _Vocabulary, gguf: GgufFile) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **vocabulary.special,
    }
    prefix = "tokenizer.chat_template"
    templates = {
        key.removeprefix(prefix).removeprefix(".") or "default": text
        for key, text in gguf.keys.items()
        if key == prefix or key.startswith(f"{prefix}.")
    }
    for which, text in templates.items():
        if not isinstance(text, str) or not _is_utf8(text):
            raise CheckpointError(
                f"{vocabulary.name} has a chat template ({shown(which)}) that is no text of UTF-8."
            )
    if templates.keys() == {"default"}:
        settings["chat_template"] = templates["default"]
    elif templates:
        settings["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
    return settings


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
