"""Which drafts a run has: none, the row's own text, or a draft QPC beside the main one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qaic_ray.engine.drafts import DraftProgram, PromptLookup
from qaic_ray.engine.engine import Proposer
from qaic_ray.engine.session import Session
from qaic_ray.errors import UsageError
from qaic_ray.options import Generation
from qaic_ray.sdk import Sdk


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
    session = Session(sdk, Path(asked.draft_qpc), main.device_ids)
    try:
        _check_vocab(session, main)
        return Drafting(DraftProgram(session, shapes.decode.batch_size), session)
    except UsageError:
        session.close()
        raise


def _check_vocab(draft: Session, main: Session) -> None:
    sizes = draft.vocab_size, main.vocab_size
    if None not in sizes and sizes[0] != sizes[1]:
        raise UsageError(
            f"The draft QPC has a vocabulary of {sizes[0]} and the main one of {sizes[1]}: a draft "
            "must be of the same tokenizer."
        )
