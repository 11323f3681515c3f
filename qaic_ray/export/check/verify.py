"""Compares an exported graph with PyTorch: the same prompts through both, differences as data.

`trace_prompts` runs PyTorch, `replay.py` the graph. No other file of the export runs torch.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from qaic_ray.contract import NUM_LOGITS_TO_KEEP
from qaic_ray.errors import CheckpointError, ExportError, UsageError
from qaic_ray.export.check.replay import (
    Activation,
    Floats,
    Ints,
    PositionIdsReplay,
    Replay,
    ReplayAnswer,
    kept_layers,
    open_replay,
)
from qaic_ray.export.conversion import FLOAT16_MAX
from qaic_ray.files.documents import checked, read_object
from qaic_ray.files.folders import write_whole
from qaic_ray.model.checkpoint import (
    VERIFY_FILE,
    Checkpoint,
    ModelManifest,
    load_tokenizer,
    load_torch_model,
    read_manifest,
)
from qaic_ray.model.tokenizer import has_vocabulary

PROMPTS = (
    "My name is",
    "The three largest cities of Japan by population are",
    "The capital of France is Paris, and the river that flows through the old town is called the",
)
NUM_DECODE_STEPS = 2
FLOAT32_TOLERANCE = 2e-3
"""Largest difference of a float32 logit that passes."""
FLOAT16_TOLERANCE = 2e-2
"""The same for a float16 graph, as a fraction of the largest logit: its weights are rounded."""
CTX_LEN = 64  # where the model has as much
CHUNK_LEN = 8
"""Tokens of a prefill chunk of a verification."""


@dataclass(frozen=True)
class Trace:
    """One prompt and its greedy continuation.

    `tokens` are the prompt's and those decoded from it but the last, `logits` [tokens, vocab] what
    follows each of them; `keys` and `values` are [heads, tokens, head_dim], one for every layer.
    """

    prompt_len: int
    tokens: Ints
    logits: Floats
    keys: list[Floats]
    values: list[Floats]

    @property
    def prompt(self) -> Ints:
        """The prompt's tokens; those behind them are decoded."""
        return self.tokens[: self.prompt_len]


@dataclass(frozen=True)
class ScenarioDifference:
    """Largest absolute differences over one scenario, and in how many rows the top token agreed."""

    scenario: str
    logits: float
    past_keys: float
    past_values: float
    num_rows: int
    num_top1_equal: int


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of `verify_export`; `layers` are those that were looked at.

    `overflows` are the activations that the prompts drove beyond float16, so that a card cannot
    hold them; `largest` is the one that came nearest to it, or went farthest.
    """

    level: str
    layers: tuple[int, ...]
    ctx_len: int
    tolerance: float
    scenarios: tuple[ScenarioDifference, ...]
    largest: Activation
    overflows: tuple[Activation, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every logit is within the tolerance (a NaN is not)."""
        return all(s.logits <= self.tolerance for s in self.scenarios)

    def raise_if_different(self) -> None:
        """Raise ExportError naming the worst scenario, unless the report passed."""
        if not self.passed:
            worst = max(self.scenarios, key=lambda s: np.nan_to_num(s.logits, nan=np.inf))
            raise ExportError(
                f"The exported graph differs from PyTorch by {worst.logits:.3g} in a logit "
                f"({worst.scenario}); {self.tolerance:.3g} is allowed."
            )


def verify_export(model_dir: Path, checkpoint: Checkpoint, *, level: str = "full") -> VerifyReport:
    """Run prompts through transformers and through an exported graph.

    Args:
        model_dir: an exported model; it is only read.
        checkpoint: what it was made from.
        level: `full`, or `quick` for the first and last two layers of both.

    Raises:
        UsageError: `model_dir` is not an exported model.
    """
    manifest = read_manifest(model_dir)
    ctx_len = min(CTX_LEN, manifest.max_position)
    chunk_len = max(1, min(CHUNK_LEN, (ctx_len - NUM_DECODE_STEPS) // 2))
    # Whole chunks, because rows that are padded on the left take so much of the context.
    longest = (ctx_len - NUM_DECODE_STEPS) // chunk_len * chunk_len
    prompts = _prompt_ids(checkpoint, manifest.vocab_size, longest)
    return compare(
        model_dir, checkpoint, prompts, ctx_len=ctx_len, chunk_len=chunk_len, level=level
    )


def compare(
    model_dir: Path,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    ctx_len: int,
    chunk_len: int,
    level: str = "full",
) -> VerifyReport:
    """`verify_export` with prompts (token ids) and sizes of one's own."""
    manifest = read_manifest(model_dir)
    layers = kept_layers(manifest.num_layers, level)
    traces = trace_prompts(
        checkpoint,
        prompts,
        num_steps=NUM_DECODE_STEPS,
        layers=None if len(layers) == manifest.num_layers else layers,
        clip=manifest.num_clipped > 0,
    )
    replay = open_replay(model_dir, manifest, layers, ctx_len)
    scenarios = _Scenarios(replay, manifest, traces, chunk_len)
    scenarios.prefill_and_decode()
    scenarios.chunked_prefill()
    scenarios.mixed_batch()
    if manifest.continuous:
        scenarios.slot_reuse()
    if isinstance(replay, PositionIdsReplay) and manifest.logits == NUM_LOGITS_TO_KEEP:
        scenarios.speculation(replay)
    tolerance = FLOAT32_TOLERANCE
    if manifest.dtype == "float16":
        tolerance = FLOAT16_TOLERANCE * float(max(np.abs(t.logits).max() for t in traces))
    activations = replay.activations()
    beyond = [a for a in activations if not a.largest <= FLOAT16_MAX]
    return VerifyReport(
        level=level,
        layers=layers,
        ctx_len=ctx_len,
        tolerance=tolerance,
        scenarios=tuple(d.total(name) for name, d in scenarios.differences.items()),
        largest=max(activations, key=lambda a: a.largest),
        overflows=tuple(sorted(beyond, key=lambda a: (a.layer is None, a.layer or 0, a.name))),
    )


def write_report(report: VerifyReport, model_dir: Path) -> None:
    """Put `verify.json` into a model folder, whole or not at all."""
    text = json.dumps(asdict(report) | {"passed": report.passed}, indent=2, allow_nan=False)
    write_whole(model_dir / VERIFY_FILE, text + "\n")


def read_report(model_dir: Path) -> VerifyReport | None:
    """The report of an earlier verification of a folder, None where there was none."""
    path = model_dir / VERIFY_FILE
    if not path.is_file():
        return None
    try:
        fields = read_object(path)
        fields.pop("passed", None)
        return checked(VerifyReport, fields, str(path))
    except UsageError as error:
        raise UsageError(f"{error} Delete the file and verify again.") from error


def _prompt_ids(checkpoint: Checkpoint, vocab_size: int, longest: int) -> list[list[int]]:
    prompts: list[list[int]] = []
    if has_vocabulary(checkpoint.folder):
        encode = load_tokenizer(checkpoint).encode
        prompts = [encode(prompt)[:longest] for prompt in PROMPTS]
    largest = max((token for prompt in prompts for token in prompt), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"The tokenizer of {checkpoint.name} is of another model: it gives the token "
            f"{largest}, and vocab_size in config.json is {vocab_size}."
        )
    if prompts and all(prompts):
        return prompts
    # A checkpoint without a tokenizer still has a graph to check; its tokens have no meaning.
    raw = [list(prompt.encode()) for prompt in PROMPTS]
    return [[byte % vocab_size for byte in prompt][:longest] for prompt in raw]


def trace_prompts(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    num_steps: int,
    layers: Sequence[int] | None = None,
    clip: bool = False,
) -> list[Trace]:
    """Run prompts through transformers in float32.

    Args:
        checkpoint: opened with its weights.
        prompts: token ids.
        num_steps: tokens decoded after each prompt.
        layers: the layers to run, where not all.
        clip: bring the weights into the range of float16 first, as the export has done.
    """
    import torch

    model = load_torch_model(checkpoint, layers=layers)
    if clip:
        for parameter in model.parameters():
            clipped = parameter.clamp(-FLOAT16_MAX, FLOAT16_MAX)
            parameter.data = torch.where(parameter.isneginf(), parameter, clipped)
    with torch.inference_mode():
        return [_trace(model, prompt, num_steps) for prompt in prompts]


def _trace(model: Any, prompt: Sequence[int], num_steps: int) -> Trace:
    import torch

    fresh, tokens, logits = list(prompt), list(prompt), []
    cache: Any = None
    for _ in range(num_steps + 1):
        result = model(torch.tensor([fresh]), past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        logits.append(result.logits[0].numpy())
        fresh = [int(logits[-1][-1].argmax())]
        tokens += fresh
    return Trace(
        prompt_len=len(prompt),
        tokens=np.array(tokens[:-1], np.int64),
        logits=np.concatenate(logits),
        keys=[layer.keys[0].numpy() for layer in cache.layers],
        values=[layer.values[0].numpy() for layer in cache.layers],
    )


class _Scenarios:
    """Runs the prompts in several ways and keeps a difference for each, by its name."""

    def __init__(
        self, replay: Replay, manifest: ModelManifest, traces: Sequence[Trace], chunk_len: int
    ) -> None:
        self._replay = replay
        self._continuous = manifest.continuous
        self._traces = traces
        self._chunk_len = chunk_len
        self.differences: defaultdict[str, _Difference] = defaultdict(
            lambda: _Difference(manifest.num_replicate_kv_heads)
        )

    def prefill_and_decode(self) -> None:
        """Each prompt alone, in one prefill, and then its decode steps."""
        for trace in self._traces:
            self._reset(1)
            self._prefill("prefill", [trace], [0], trace.prompt_len)
            self._decode("decode", [trace], [0])

    def chunked_prefill(self) -> None:
        """The longest prompt in chunks, one of them padded."""
        longest = [max(self._traces, key=lambda t: t.prompt_len)]
        self._reset(1)
        self._prefill("chunked prefill", longest, [0], self._chunk_len)
        self._decode("chunked prefill", longest, [0])

    def mixed_batch(self) -> None:
        """Prompts of different lengths decoded together."""
        self._decode("mixed batch", self._traces, self._prefill_all("mixed batch"))

    def slot_reuse(self) -> None:
        """A short prompt in the slot that a longer one has left."""
        shortest = min(self._traces, key=lambda t: t.prompt_len)
        longest = max(self._traces, key=lambda t: t.prompt_len)
        self._reset(1)
        self._replay.prefill([longest.prompt], [1], self._chunk_len)
        self._prefill("slot reuse", [shortest], [1], self._chunk_len)
        self._decode("slot reuse", [shortest], [1])

    def speculation(self, replay: PositionIdsReplay) -> None:
        """Several tokens of every row in one step, and one of the last row."""
        counts = [NUM_DECODE_STEPS] * (len(self._traces) - 1) + [1]
        slots = self._prefill_all("speculation")
        rows = list(zip(self._traces, slots, counts, strict=True))
        more = [t.tokens[t.prompt_len : t.prompt_len + count].tolist() for t, _, count in rows]
        answers = replay.extend(more, slots)
        self._compare("speculation", answers, rows)

    def _reset(self, num_rows: int) -> None:
        # One slot more than rows, so that one always belongs to no row.
        self._replay.reset(len(self._traces) + 1 if self._continuous else num_rows)

    def _prefill_all(self, name: str) -> Sequence[int]:
        """Every prompt in a row of its own; the rows."""
        num_rows = len(self._traces)
        self._reset(num_rows)
        if not self._continuous:
            self._prefill(name, self._traces, range(num_rows), self._chunk_len)
            return range(num_rows)
        slots = range(num_rows, 0, -1)
        for trace, slot in zip(self._traces, slots, strict=True):
            self._prefill(name, [trace], [slot], self._chunk_len)
        return slots

    def _prefill(
        self, name: str, traces: Sequence[Trace], slots: Sequence[int], chunk_len: int
    ) -> None:
        answers = self._replay.prefill([trace.prompt for trace in traces], slots, chunk_len)
        self._compare(name, answers, zip(traces, slots, repeat(0)))

    def _decode(self, name: str, traces: Sequence[Trace], slots: Sequence[int]) -> None:
        for step in range(NUM_DECODE_STEPS):
            tokens = [int(trace.tokens[trace.prompt_len + step]) for trace in traces]
            answers = self._replay.decode(tokens, slots)
            self._compare(name, answers, zip(traces, slots, repeat(step + 1)))

    def _compare(
        self, name: str, answers: Sequence[ReplayAnswer], rows: Iterable[tuple[Trace, int, int]]
    ) -> None:
        """Compare a run's answers and caches; a row has a slot and so many decoded tokens."""
        difference, every = self.differences[name], list(rows)
        for answer in answers:
            difference.add_answer(every[answer.row][0], answer)
        for trace, slot, count in every:
            difference.add_cache(trace, self._replay.row(slot, trace.prompt_len + count))


class _Difference:
    """The largest differences over the rows of one scenario."""

    def __init__(self, num_copies: int) -> None:
        self._num_copies = num_copies
        self._largest: list[list[float]] = [[0.0], [0.0], [0.0]]
        self._top1: list[bool] = []

    def add_answer(self, trace: Trace, answer: ReplayAnswer) -> None:
        """Compare logits; of a token id, how far its logit is from the largest one."""
        expected = trace.logits[answer.position]
        if answer.values.dtype.kind == "i":
            token = int(answer.values[0])
            self._largest[0].append(float(expected.max() - expected[token]))
        else:
            token = int(answer.values.argmax())
            self._largest[0].append(_largest(answer.values, expected))
        self._top1.append(token == int(expected.argmax()))

    def add_cache(self, trace: Trace, past: tuple[list[Floats], list[Floats]]) -> None:
        """Compare the keys and values of a row, a list over the layers each."""
        for which, (got, truth) in enumerate(zip(past, (trace.keys, trace.values), strict=True)):
            for layer, layer_truth in zip(got, truth, strict=True):
                seen = np.repeat(layer_truth[:, : layer.shape[1]], self._num_copies, axis=0)
                self._largest[which + 1].append(_largest(layer, seen))

    def total(self, scenario: str) -> ScenarioDifference:
        """The difference of the scenario of this name."""
        logits, keys, values = (float(np.max(found)) for found in self._largest)
        return ScenarioDifference(scenario, logits, keys, values, len(self._top1), sum(self._top1))


def _largest(got: Floats, expected: Floats) -> float:
    if got.shape != expected.shape:
        return math.inf
    return float(np.max(np.abs(got.astype(np.float32) - expected)))
