"""What the slots of a worker hold: the beginnings of the prompts and answers that ran there last.

A beginning is a chain of numbers, one for each whole block of tokens, and each follows from all
tokens up to its block's end. So two chains have as many numbers in common as their tokens have
blocks, and a number that two have at one place says that all before it are the same. A prompt
without token ids is taken by its characters.
"""

from __future__ import annotations

from collections.abc import Sequence

from qaic_ray.dispatch.policy import Policy
from qaic_ray.rows import Prompt, Row

Beginning = tuple[int, ...]

MAX_BLOCKS = 4096
"""Of what is longer only so many blocks count."""


def beginning_of(prompt: Prompt, policy: Policy, row: Row | None = None) -> Beginning:
    """The chain of a prompt, and of its answer behind it where that is given.

    Args:
        prompt: by its tokens; a conversation or text without them by its characters.
        policy: `block_tokens` and `token_chars` are used.
        row: as it came; one without an answer adds nothing.
    """
    block = policy.block_tokens
    answer = row if row is not None and row.ok else None
    content: Sequence[object]
    if prompt.token_ids is not None:
        content = prompt.token_ids
        if answer is not None:
            content = (*content, *answer.token_ids[:-1])  # the last one was never fed
    else:
        block *= policy.token_chars
        content = _text_of(prompt, answer)
    chain: list[int] = []
    number = 0
    for end in range(block, min(len(content), MAX_BLOCKS * block) + 1, block):
        number = hash((number, content[end - block : end]))
        chain.append(number)
    return tuple(chain)


def _text_of(prompt: Prompt, answer: Row | None) -> str:
    if prompt.messages is None:
        return prompt.text if answer is None else prompt.text + answer.text
    turns = [(turn["role"], turn.get("content", "")) for turn in prompt.messages]
    if answer is not None:
        turns.append(("assistant", answer.text))
    return "".join(f"{role}\0{text}\0" for role, text in turns)


def num_common(left: Beginning, right: Beginning) -> int:
    """Blocks that two chains have in common."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[middle - 1] == right[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


class HeldBeginnings:
    """The slots of one worker, as its batcher fills them: a prompt takes the free slot that holds
    the longest beginning of it, of equals the one that has been free the longest.

    Args:
        num_slots: as many chains are kept, beside those of prompts that are queued there.
        policy: see `beginning_of`.
    """

    def __init__(self, num_slots: int, policy: Policy) -> None:
        self._num_slots = num_slots
        self._policy = policy
        self._free: list[Beginning] = [()] * num_slots
        self._running: dict[int, Beginning] = {}

    def __len__(self) -> int:
        return len(self._free) + len(self._running)

    def num_held(self, beginning: Beginning) -> int:
        """Blocks of a beginning that a free slot holds; running ones share nothing."""
        # Most slots hold nothing of it, which their first block tells.
        alike = [held for held in self._free if held[:1] == beginning[:1]]
        return max((num_common(held, beginning) for held in alike), default=0)

    def begin(self, prompt: Prompt) -> None:
        """A prompt goes to a slot, or is queued."""
        beginning, free = beginning_of(prompt, self._policy), self._free
        if free:
            del free[max(range(len(free)), key=lambda i: num_common(free[i], beginning))]
        self._running[prompt.index] = beginning

    def end(self, prompt: Prompt, row: Row | None = None) -> None:
        """A prompt gives its slot back, which holds it now, with its answer where there is one."""
        held = self._running.pop(prompt.index)
        if row is not None and row.ok:
            held = beginning_of(prompt, self._policy, row)
        self._free.append(held)
        if len(self) > self._num_slots:
            del self._free[0]

    def forget(self) -> None:
        """The card's state was lost: its slots hold nothing any more."""
        self._free = [()] * len(self._free)
        self._running = dict.fromkeys(self._running, ())
