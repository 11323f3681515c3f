"""Logprobs of a prompt's own tokens, of a program that keeps the logits of each."""

from __future__ import annotations

from qaic_ray.engine.bindings import Logits
from qaic_ray.engine.sampler import token_logprob
from qaic_ray.engine.step_io import StepInputs
from qaic_ray.engine.steps import Sequence, Step


def score_prompts(step: Step, inputs: StepInputs, logits: Logits) -> None:
    """Take in what a step says of the prompts of rows that want to know; before its commit.

    Args:
        step: the batcher's plan.
        inputs: where its rows are in the program.
        logits: [rows, columns, vocab], a column for each token of a row.
    """
    for i, (_, sequence) in enumerate(step.rows):
        scores = sequence.prompt_logprobs
        if scores is None or len(scores) + 1 >= len(sequence.prompt_ids):
            continue
        column, position, count = _columns(step, i, sequence)
        num_top = sequence.params.prompt_logprobs or 0
        # The logits of a token are about the one behind it.
        behind = sequence.prompt_ids[position + 1 : position + 1 + count]
        known = max(len(scores) - position, 0)  # of a row that is computed again
        for at, token in enumerate(behind[known:], start=column + known):
            scores.append(token_logprob(logits[inputs.rows[i], at], token, num_top))


def _columns(step: Step, row: int, sequence: Sequence) -> tuple[int, int, int]:
    """The first column of a row's tokens, that token's position, and how many there are."""
    if not step.padded_len:
        return 0, sequence.num_computed, step.counts[row]
    # In lockstep a row is padded on the left; a chunk may hold nothing else of it.
    start = step.cache_index - (step.padded_len - len(sequence.prompt_ids))
    column = min(max(-start, 0), step.seq_len)
    return column, start + column, step.seq_len - column
