"""Tokens guessed ahead, for a program that checks several of them a row in one decode step.

`open_drafting` opens what a run has: nothing, the row's own text, or a draft QPC.

`PromptLookup` guesses from the row's own text. Answers repeat their prompts (summaries, code,
extraction) and themselves; the tokens behind the latest earlier occurrence of the last tokens are
then a good guess, and a wrong one costs only its place in a decode shape that is there anyway.
`DraftProgram` asks a second, smaller program on the same card.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

from qaic_ray.engine.engine import Engine, Proposer
from qaic_ray.engine.session import Session
from qaic_ray.engine.step_io import Drafts
from qaic_ray.engine.steps import Sequence
from qaic_ray.errors import UsageError
from qaic_ray.options import Generation
from qaic_ray.sdk import Sdk

MAX_NGRAM = 3
"""Longest run of last tokens that is looked up; the longest that is found decides."""

RIDE_LEN = 4
"""New tokens that a row feeds one by one, with the other rows, rather than in a prefill step of its
own; after a draft that was accepted whole there are two."""


DRAFT_ROLE = "draft"
"""What a bundle of a draft QPC's executions is called by, beside that of the main one."""


@dataclass
class _Text:
    """The tokens of one row, and where each n-gram ended last."""

    tokens: list[int]
    next_of: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0

    def index(self) -> None:
        """Take in every n-gram that has a token behind it by now."""
        for end in range(self.num_indexed + 1, len(self.tokens)):
            for length in range(1, min(MAX_NGRAM, end) + 1):
                self.next_of[tuple(self.tokens[end - length : end])] = end
        self.num_indexed = max(len(self.tokens) - 1, 0)

    def guess(self, room: int, ahead: Listed[int]) -> list[int]:
        """At most `room` tokens that may come behind those that are known `ahead`."""
        last = [*self.tokens[-MAX_NGRAM:], *ahead][-MAX_NGRAM:]
        for length in range(len(last), 0, -1):
            start = self.next_of.get(tuple(last[-length:]))
            if start is not None:
                known = [*self.tokens[start:], *ahead]
                # A repetition that reaches the end goes on repeating.
                return [known[i % len(known)] for i in range(room)]
        return []


class PromptLookup:
    """Drafts from the row's own prompt and answer."""

    def __init__(self) -> None:
        self._texts: dict[Sequence, _Text] = {}

    def propose(self, rows: Listed[Sequence], room: Listed[int], known: Drafts) -> list[list[int]]:
        """At most `room[i]` tokens for row i, behind those that are known."""
        return [
            self._propose(sequence, most, ahead) if most > 0 else []
            for sequence, most, ahead in zip(rows, room, known, strict=True)
        ]

    def release(self, sequence: Sequence) -> None:
        """Forget a row."""
        self._texts.pop(sequence, None)

    def _propose(self, sequence: Sequence, most: int, ahead: Listed[int]) -> list[int]:
        text = self._texts.get(sequence)
        if text is None:
            text = self._texts[sequence] = _Text(list(sequence.prompt_ids))
        text.tokens += sequence.output_ids[len(text.tokens) - len(sequence.prompt_ids) :]
        text.index()
        return text.guess(most, ahead)


class DraftProgram:
    """Drafts by greedy decoding on a draft QPC, with an engine of its own.

    Every proposal gives it each row's tokens as a prompt. Its slots remember what they hold, so
    only tokens that are new since the last proposal are computed.

    Args:
        program: opened; of the `position-ids` contract, of the same tokenizer as the main one.
        num_rows: rows of the main program, all of which are asked for at once.

    Raises:
        UsageError: where the draft program has fewer slots than that.
    """

    def __init__(self, program: Session, num_rows: int) -> None:
        slots = program.specializations.batch_size
        if slots < num_rows:
            raise UsageError(
                f"The draft QPC has {slots} slots and the main one decodes {num_rows} rows at "
                f"once: compile the draft with --batch-size {num_rows}."
            )
        self._engine = Engine(program, ride_len=RIDE_LEN)
        self._ctx_len = program.specializations.ctx_len

    def propose(self, rows: Listed[Sequence], room: Listed[int], known: Drafts) -> list[list[int]]:
        """At most `room[i]` tokens for row i; none for a row beyond the draft's context."""
        asked: dict[int, Sequence] = {}
        for key, (sequence, most, ahead) in enumerate(zip(rows, room, known, strict=True)):
            tokens = (*sequence.prompt_ids, *sequence.output_ids, *ahead)
            most = min(most, self._ctx_len - len(tokens) + 1)
            if most > 0:
                asked[key] = Sequence(key, tokens, most)
                self._engine.add(asked[key])
        while self._engine.busy:
            self._engine.step()
        return [asked[key].output_ids if key in asked else [] for key in range(len(rows))]

    def release(self, sequence: Sequence) -> None:
        """Nothing to do: the slot keeps its tokens until another row needs it."""


@dataclass(frozen=True)
class Drafting:
    """What an opened worker drafts with; `session` is a draft QPC's, to be closed after use."""

    proposer: Proposer | None = None
    session: Session | None = None

    def close(self) -> None:
        """Give the draft QPC's part of the card back."""
        if self.session is not None:
            self.session.close()


def open_drafting(asked: Generation, sdk: Sdk, main: Session) -> Drafting:
    """Open what drafts for `main`, on the same card.

    Raises:
        UsageError: the main QPC cannot check drafts, or the draft QPC does not fit to it.
        DeviceError: from the card, when the draft QPC has no room beside the main one.
    """
    shapes = main.specializations
    if shapes.decode_len == 1:
        if asked.draft_qpc is not None or asked.drafts == "prompt-lookup":
            raise UsageError(
                f"{main.qpc} takes one token a row in a decode step, so it cannot check drafts: "
                "export with --logits num_logits_to_keep and compile with "
                "--num-speculative-tokens 3."
            )
        return Drafting()
    if asked.drafts == "none":
        return Drafting()
    if asked.draft_qpc is None:
        return Drafting(PromptLookup())
    session = Session(sdk, asked.draft_qpc, main.device_ids)
    try:
        sizes = session.vocab_size, main.vocab_size
        if None not in sizes and sizes[0] != sizes[1]:
            raise UsageError(
                f"The draft QPC has a vocabulary of {sizes[0]} and the main one of {sizes[1]}: a "
                "draft must be of the same tokenizer."
            )
        return Drafting(DraftProgram(session, shapes.decode.batch_size), session)
    except UsageError:
        session.close()
        raise
