"""What a worker drafts with: chosen, opened on the main QPC's card, refused where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qaic_ray.engine.drafts import DraftProgram, PromptLookup, open_drafting
from qaic_ray.engine.session import Session
from qaic_ray.errors import DeviceBusy, UsageError
from qaic_ray.options import Generation

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs


@contextmanager
def opened(tiny: TinyQpcs, qpc: Path) -> Iterator[Session]:
    session = Session(tiny.sdk, qpc, [1])
    try:
        yield session
    finally:
        session.close()


def test_prompt_lookup_is_what_a_speculative_qpc_has_where_nothing_is_said(tiny: TinyQpcs) -> None:
    with opened(tiny, tiny.qpc(num_speculative_tokens=3)) as main:
        assert isinstance(open_drafting(Generation(), tiny.sdk, main).proposer, PromptLookup)
        asked = Generation(drafts="none")
        assert open_drafting(asked, tiny.sdk, main).proposer is None


def test_a_draft_qpc_is_opened_beside_and_given_back(tiny: TinyQpcs) -> None:
    draft = tiny.qpc(batch_size=2, num_cores=4)
    with opened(tiny, tiny.qpc(batch_size=2, num_speculative_tokens=3, num_cores=8)) as main:
        for _ in range(2):  # a second time only when the first has given its cores back
            drafting = open_drafting(Generation(draft_qpc=str(draft)), tiny.sdk, main)
            assert isinstance(drafting.proposer, DraftProgram)
            drafting.close()


def test_a_draft_qpc_without_room_beside_the_main_one_is_a_busy_card(tiny: TinyQpcs) -> None:
    draft = tiny.qpc(batch_size=2)  # all 14 cores
    with (
        opened(tiny, tiny.qpc(batch_size=2, num_speculative_tokens=3)) as main,
        pytest.raises(DeviceBusy),
    ):
        open_drafting(Generation(draft_qpc=str(draft)), tiny.sdk, main)


def test_a_draft_qpc_with_too_few_slots_is_refused_and_given_back(tiny: TinyQpcs) -> None:
    draft = tiny.qpc(batch_size=1, num_cores=4)
    with opened(tiny, tiny.qpc(batch_size=2, num_speculative_tokens=3, num_cores=8)) as main:
        for _ in range(2):
            with pytest.raises(UsageError, match="--batch-size 2"):
                open_drafting(Generation(draft_qpc=str(draft)), tiny.sdk, main)


@pytest.mark.parametrize("asked", [Generation(drafts="prompt-lookup"), Generation(draft_qpc="x")])
def test_a_plain_qpc_cannot_speculate(tiny: TinyQpcs, asked: Generation) -> None:
    with opened(tiny, tiny.qpc()) as main:
        assert open_drafting(Generation(), tiny.sdk, main).proposer is None
        with pytest.raises(UsageError, match="--num-speculative-tokens 3"):
            open_drafting(asked, tiny.sdk, main)
