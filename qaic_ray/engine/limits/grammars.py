"""Grammars that answers follow, by llguidance: which tokens may come next, which must, and the end.

A tokenizer is read once, a grammar once as long as rows ask for it; each row has a matcher of its
own.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import RowError
from qaic_ray.files.documents import shown
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT = 64
"""Grammars that are kept for rows to come."""


class GrammarGuide:
    """Where one row is in its grammar; made by `Grammars`. A `steps.Guide`.

    Args:
        matcher: at the row's beginning, and nobody else's.
        end_ids: the tokens that the matcher takes for an end.
        num_tokens: of the model's vocabulary.
    """

    def __init__(self, matcher: LLMatcher, end_ids: tuple[int, ...], num_tokens: int) -> None:
        self._matcher = matcher
        self._forced: Listed[int] | None = None
        self.end_ids = end_ids
        self.num_tokens = num_tokens
        self.is_done = False

    @property
    def may_end(self) -> bool:
        """Whether the answer is whole here."""
        return self._matcher.is_accepting()

    def allowed(self) -> bytes:
        """A bit a token, the lowest first: those that the grammar allows next.

        Raises:
            RowError: the grammar became too complex to be followed here.
        """
        bits = self._matcher.compute_bitmask()
        self._check()
        return bits

    def forced(self) -> Listed[int]:
        """The tokens that the text must go on with, as the tokenizer writes it; often none."""
        if self._forced is None:
            tokens = [] if self.is_done else self._matcher.compute_ff_tokens()
            self._forced = tokens[: self._matcher.validate_tokens(tokens)] if tokens else tokens
            self._check()
        return self._forced

    def take(self, token: int) -> None:
        """Go on with a token that is allowed.

        Raises:
            RowError: it is not, or the grammar became too complex.
        """
        self._matcher.consume_token(token)
        self._check()
        self._moved()

    def try_take(self, token: int) -> bool:
        """Go on with a token if it is allowed; whether it was."""
        taken = self._matcher.try_consume_tokens([token]) == 1
        if taken:
            self._moved()
        return taken

    def go_back(self, num_tokens: int) -> None:
        """Undo the last tokens."""
        if num_tokens:
            self._matcher.rollback(num_tokens)
            self._check()
            self._moved()

    def _moved(self) -> None:
        self._forced = None
        self.is_done = self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RowError(
                f"structured_outputs cannot be followed: {_sentence(self._matcher.get_error())}."
            )


class Grammars:
    """Makes guides for the rows of one worker; threads may share it.

    Args:
        tokenizer_json: gives the text of the tokenizer's `tokenizer.json`, when it is needed first.
        end_ids: tokens that end an answer.
        num_tokens: width of the logits; None where it is not known.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], end_ids: Listed[int], num_tokens: int | None
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._end_ids = tuple(end_ids)
        self._num_tokens = num_tokens
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._matchers: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()

    def guide(self, asked: StructuredOutputs) -> GrammarGuide:
        """A guide at the beginning of an answer.

        Raises:
            RowError: the grammar, or this tokenizer, is not for llguidance.
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._read_tokenizer()
            matcher = self._matchers.pop(asked, None) or _matcher(self._tokenizer, asked)
            self._matchers[asked] = matcher  # the last used one is the last
            if len(self._matchers) > MAX_KEPT:
                self._matchers.popitem(last=False)
            num_tokens = self._num_tokens or self._tokenizer.vocab_size
            end_ids = tuple(self._tokenizer.eos_tokens)
            return GrammarGuide(matcher.deep_copy(), end_ids, num_tokens)

    def _read_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        try:
            text = _readable(self._tokenizer_json())
            tokenizer = LLTokenizer(text, eos_token=list(self._end_ids) or None)
            if self._num_tokens is not None and self._num_tokens > tokenizer.vocab_size:
                # Logits may be wider than the vocabulary; what is beyond is never allowed.
                tokenizer = LLTokenizer(
                    text, n_vocab=self._num_tokens, eos_token=list(self._end_ids) or None
                )
        except Exception as error:  # the library raises nothing narrower
            raise RowError(
                "structured_outputs is not for this model: llguidance cannot read its tokenizer "
                f"({_sentence(str(error))}): leave it out."
            ) from error
        return tokenizer


def _readable(tokenizer_json: str) -> str:
    """A `tokenizer.json` that adds no space before a text.

    llguidance takes the tokens that a tokenizer writes a text with for those that the text needs.
    """
    document: dict[str, Any] = json.loads(tokenizer_json)
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "ByteLevel":
            step["add_prefix_space"] = False
    return json.dumps(document)


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    return (
        [step for inner in part[name] for step in _steps(inner, name)] if name in part else [part]
    )


def _matcher(tokenizer: LLTokenizer, asked: StructuredOutputs) -> LLMatcher:
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, asked.grammar_text, log_level=0)
    if matcher.is_error():
        raise RowError(f"structured_outputs cannot be followed: {_sentence(matcher.get_error())}.")
    return matcher


def _sentence(said: str) -> str:
    return shown(" ".join(said.split()).rstrip("."))
