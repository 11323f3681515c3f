"""The program's output as the tokens of a step's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listed
from contextlib import suppress
from typing import cast

from qaic_ray.engine.bindings import Logits, Output, TokenIds
from qaic_ray.engine.sampler import Selector, overflowed
from qaic_ray.engine.step_io import Drafts, StepInputs
from qaic_ray.engine.steps import Sequence, Step
from qaic_ray.errors import RowError
from qaic_ray.rows import ROW_ALONE


class TokenPicker:
    """Chooses tokens for the rows of one program.

    Rows that ask only for the most likely token are answered together; the others go through the
    selector. A row whose own sampling fails, or whose logits overflowed, ends with an error; its
    neighbours are answered as ever.

    Args:
        selector: chooses by a row's own parameters.
        emits_tokens: the program gives token ids in place of logits.
        fail: is called for a row that ends without an answer.
    """

    def __init__(
        self, selector: Selector, *, emits_tokens: bool, fail: Callable[[RowError, Sequence], None]
    ) -> None:
        self._emits_tokens = emits_tokens
        self._fail = fail
        self._selector = selector
        self._in_selector: dict[Sequence, int] = {}
        self._special: set[Sequence] = set()
        self._guided: set[Sequence] = set()

    @property
    def has_guided(self) -> bool:
        """Whether any row follows a grammar, so that `prepare` has something to do."""
        return bool(self._guided)

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence that steps will have rows of."""
        if not sequence.params.is_plain:
            self._special.add(sequence)
        if sequence.guide is not None:
            self._guided.add(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """A sequence gives its slot, and comes back with the tokens that it has."""
        slot = self._in_selector.pop(sequence, None)
        if slot is not None:
            self._selector.leave(slot)

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self.preempt(sequence)
        self._special.discard(sequence)
        self._guided.discard(sequence)

    def prepare(self, step: Step, inputs: StepInputs, drafts: Drafts | None) -> None:
        """Find out what may come next in rows that follow a grammar, while the card works.

        What a row fails with here, it fails with again where it is chosen for.
        """
        tails: Drafts = drafts or [()] * len(inputs.rows)
        for (slot, sequence), answered, tail in zip(step.rows, inputs.answers, tails, strict=True):
            if answered and sequence in self._guided:
                with suppress(RowError), ROW_ALONE:
                    self._enter([(slot, sequence)])
                    self._selector.prepare(slot, tail)

    def choose(
        self, step: Step, inputs: StepInputs, drafts: Drafts | None, output: Output
    ) -> Listed[Listed[int]]:
        """The tokens of each row; nothing for a row that is not answered, or that failed.

        Args:
            step: the batcher's plan.
            inputs: where its rows are in the program.
            drafts: guessed tokens of each row, which are kept as long as they are chosen too.
            output: logits [rows, columns, vocab], or token ids [rows, columns].
        """
        nothing: Drafts = [()] * len(inputs.rows)
        if not any(inputs.answers):
            return nothing
        if self._emits_tokens:
            return _given(inputs, drafts or nothing, cast("TokenIds", output))
        logits = cast("Logits", output)
        if self._special and any(row in self._special for _, row in step.rows):
            return self._choose_each(step, inputs, drafts or nothing, logits)
        if logits.shape[1] == 1 and drafts is None and len(inputs.rows) == len(logits):
            return self._likeliest_of_all(step, inputs, logits[:, 0])
        return [
            self._likeliest(row, inputs.piece(i, logits, len(draft)), draft) if answered else ()
            for i, ((_, row), answered, draft) in enumerate(
                zip(step.rows, inputs.answers, drafts or nothing, strict=True)
            )
        ]

    def _likeliest_of_all(
        self, step: Step, inputs: StepInputs, logits: Logits
    ) -> list[Listed[int]]:
        """The most likely token of every row, of which the program gives one column."""
        tokens = logits.argmax(axis=-1)
        every = tokens.tolist()
        chosen: list[Listed[int]] = [(every[row],) for row in inputs.rows]
        for row in overflowed(logits, every if len(every) == 1 else tokens):
            i = inputs.rows.index(row)
            if inputs.answers[i]:
                self._fail(_overflow(logits[row], every[row]), step.rows[i][1])
                chosen[i] = ()
        return chosen

    def _likeliest(self, row: Sequence, logits: Logits, draft: Listed[int]) -> list[int]:
        """The most likely tokens of one row, as long as its draft is right, and one more."""
        accepted = _accepted(logits.argmax(axis=-1).tolist(), draft)
        for column in overflowed(logits[: len(accepted)], accepted)[:1]:
            self._fail(_overflow(logits[column], accepted[column]), row)
            return []
        return accepted

    def _choose_each(
        self, step: Step, inputs: StepInputs, tails: Drafts, logits: Logits
    ) -> list[list[int]]:
        """Tokens by every row's own parameters; a drafted token is kept where it is chosen."""
        num_columns = logits.shape[1]
        flat = logits.reshape(-1, logits.shape[-1])
        if not any(tails) and all(inputs.answers) and inputs.rows == list(range(len(flat))):
            return self._select(step.rows, flat)
        chosen: list[list[int]] = [[] for _ in inputs.rows]
        racing = [i for i, answered in enumerate(inputs.answers) if answered]
        while racing:
            at = [
                inputs.rows[i] * num_columns
                + inputs.column(i, num_columns, len(tails[i]))
                + len(chosen[i])
                for i in racing
            ]
            asked = flat if at == list(range(len(flat))) else flat[at]
            tokens = self._select([step.rows[i] for i in racing], asked)
            for i, some in zip(racing, tokens, strict=True):
                chosen[i] += some
            racing = [
                i
                for i, some in zip(racing, tokens, strict=True)
                if some
                and list(tails[i][len(chosen[i]) - 1 : len(chosen[i])]) == some
                and not _ends_grammar(step.rows[i][1], some[0])
            ]
        return chosen

    def _select(self, rows: Listed[tuple[int, Sequence]], logits: Logits) -> list[list[int]]:
        """The next token of every row; none of a row over which that fails, which so ends."""
        try:
            with ROW_ALONE:
                self._enter(rows)
                choice = self._selector.choose(logits, [slot for slot, _ in rows])
        except RowError as error:
            if len(rows) > 1:  # whose fault it is shows alone
                return [self._select([row], logits[i : i + 1])[0] for i, row in enumerate(rows)]
            self._fail(error, rows[0][1])
            return [[]]
        chosen = [[token] for token in choice.tokens]
        for i in overflowed(logits, choice.tokens) if choice.odd else ():
            self._fail(_overflow(logits[i], choice.tokens[i]), rows[i][1])
            chosen[i] = []
        for i, failure in choice.failed.items():
            self._fail(failure, rows[i][1])
            chosen[i] = []
        for (_, sequence), logprob in zip(rows, choice.logprobs, strict=True):
            if logprob is not None:
                sequence.logprobs.append(logprob)
        return chosen

    def _enter(self, rows: Iterable[tuple[int, Sequence]]) -> None:
        for slot, sequence in rows:
            if sequence not in self._in_selector:
                self._selector.enter(slot, sequence)
                self._in_selector[sequence] = slot


def _ends_grammar(sequence: Sequence, token: int) -> bool:
    """Whether a token ends a row that follows a grammar: there is nothing to choose behind it."""
    guide = sequence.guide
    return guide is not None and (guide.is_done or token in sequence.stop_ids)


def _given(inputs: StepInputs, drafts: Drafts, token_ids: TokenIds) -> list[Listed[int]]:
    """The tokens of a program that chooses them itself."""
    if token_ids.shape[1] == 1 and not any(drafts):
        every = token_ids[:, 0].tolist()
        return [(every[row],) for row in inputs.rows]
    return [
        _accepted(inputs.piece(i, token_ids, len(draft)).tolist(), draft)
        for i, draft in enumerate(drafts)
    ]


def _overflow(logits: Logits, token: int) -> RowError:
    """The error of a row whose largest logit is not a finite number."""
    return RowError(
        f"The model's logits hold {float(logits[token])} here: a value beyond float16 came up on "
        "the way. `verify.json` of the export names what overflows, and what is nearest to it; "
        "compile with fp32, or take weights that were made for float16."
    )


def _accepted(tokens: list[int], draft: Listed[int]) -> list[int]:
    """The tokens up to the first that differs from the draft, that one included."""
    for position, drafted in enumerate(draft):
        if tokens[position] != drafted:
            return tokens[: position + 1]
    return tokens
