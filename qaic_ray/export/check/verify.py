"""Compares an exported graph with PyTorch: the same prompts through both, differences as data.

`reference.py` runs PyTorch, `replay.py` the graph.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qaic_ray.contract import NUM_LOGITS_TO_KEEP
from qaic_ray.errors import CheckpointError, ExportError, UsageError
from qaic_ray.export.architecture import Architecture
from qaic_ray.export.check.headroom import Activation, beyond_float16, largest_activation
from qaic_ray.export.check.reference import Floats, Trace, trace_prompts
from qaic_ray.export.check.replay import (
    PositionIdsReplay,
    Replay,
    ReplayAnswer,
    kept_layers,
    open_replay,
)
from qaic_ray.files.documents import checked, read_object
from qaic_ray.files.folders import write_whole
from qaic_ray.model.checkpoint import (
    VERIFY_FILE,
    Checkpoint,
    ModelManifest,
    load_tokenizer,
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
FULL_PARAMETERS = 2_000_000_000
"""Models below this are checked with all their layers by default."""

CTX_LEN = 64
"""Context of a verification, where the model has as much."""
CHUNK_LEN = 8
"""Tokens of a prefill chunk of a verification."""


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
        if self.passed:
            return
        worst = max(self.scenarios, key=lambda s: np.nan_to_num(s.logits, nan=np.inf))
        raise ExportError(
            f"The exported graph differs from PyTorch by {worst.logits:.3g} in a logit "
            f"({worst.scenario}); {self.tolerance:.3g} is allowed."
        )


def default_level(architecture: Architecture) -> str:
    """`full` for a model that fits into the memory of a workstation, else `quick`."""
    return "full" if architecture.num_parameters < FULL_PARAMETERS else "quick"


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
    prompts = _prompt_ids(checkpoint, manifest, longest=longest)
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
        tolerance = FLOAT16_TOLERANCE * max(float(np.abs(t.logits).max()) for t in traces)
    return VerifyReport(
        level=level,
        layers=layers,
        ctx_len=ctx_len,
        tolerance=tolerance,
        scenarios=tuple(difference.total() for difference in scenarios.differences),
        largest=largest_activation(replay.largest),
        overflows=beyond_float16(replay.largest),
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


def _prompt_ids(
    checkpoint: Checkpoint, manifest: ModelManifest, *, longest: int
) -> list[list[int]]:
    prompts: list[list[int]] = []
    if has_vocabulary(checkpoint.folder):
        encode = load_tokenizer(checkpoint).encode
        prompts = [encode(prompt)[:longest] for prompt in PROMPTS]
    largest = max((token for prompt in prompts for token in prompt), default=0)
    if largest >= manifest.vocab_size:
        raise CheckpointError(
            f"The tokenizer of {checkpoint.name} is of another model: it gives the token "
            f"{largest}, and vocab_size in config.json is {manifest.vocab_size}."
        )
    if prompts and all(prompts):
        return prompts
    # A checkpoint without a tokenizer still has a graph to check; its tokens have no meaning.
    raw = [list(prompt.encode()) for prompt in PROMPTS]
    return [[byte % manifest.vocab_size for byte in prompt][:longest] for prompt in raw]


class _Scenarios:
    """Runs the prompts in several ways and keeps a difference for each."""

    def __init__(
        self, replay: Replay, manifest: ModelManifest, traces: Sequence[Trace], chunk_len: int
    ) -> None:
        self._replay = replay
        self._continuous = manifest.continuous
        self._num_copies = manifest.num_replicate_kv_heads
        self._traces = traces
        self._chunk_len = chunk_len
        # One slot more than rows, so that one always belongs to no row.
        self._num_slots = len(traces) + 1
        self.differences: list[_Difference] = []

    def prefill_and_decode(self) -> None:
        """Each prompt alone, in one prefill, and then its decode steps."""
        prefill, decode = self._scenario("prefill"), self._scenario("decode")
        for trace in self._traces:
            self._reset(1)
            self._prefill([trace], [0], trace.prompt_len, prefill)
            self._decode([trace], [0], decode)

    def chunked_prefill(self) -> None:
        """The longest prompt in chunks, one of them padded."""
        trace = max(self._traces, key=lambda t: t.prompt_len)
        self._reset(1)
        difference = self._scenario("chunked prefill")
        self._prefill([trace], [0], self._chunk_len, difference)
        self._decode([trace], [0], difference)

    def mixed_batch(self) -> None:
        """Prompts of different lengths decoded together."""
        difference = self._scenario("mixed batch")
        self._decode(self._traces, self._prefill_all(difference), difference)

    def slot_reuse(self) -> None:
        """A short prompt in the slot that a longer one has left."""
        ordered = sorted(self._traces, key=lambda t: t.prompt_len)
        self._reset(1)
        longest = ordered[-1].tokens[: ordered[-1].prompt_len]
        self._replay.prefill([longest], [1], self._chunk_len)
        difference = self._scenario("slot reuse")
        self._prefill([ordered[0]], [1], self._chunk_len, difference)
        self._decode([ordered[0]], [1], difference)

    def speculation(self, replay: PositionIdsReplay) -> None:
        """Several tokens of every row in one step, and one of the last row."""
        ends = [trace.prompt_len + NUM_DECODE_STEPS for trace in self._traces]
        ends[-1] = self._traces[-1].prompt_len + 1
        more = [
            trace.tokens[trace.prompt_len : end].tolist()
            for trace, end in zip(self._traces, ends, strict=True)
        ]
        difference = self._scenario("speculation")
        slots = self._prefill_all(difference)
        for answer in replay.extend(more, slots):
            difference.add_answer(self._traces[answer.row], answer)
        for trace, slot, end in zip(self._traces, slots, ends, strict=True):
            difference.add_cache(trace, replay.row(slot, end))

    def _scenario(self, name: str) -> _Difference:
        self.differences.append(_Difference(name, self._num_copies))
        return self.differences[-1]

    def _reset(self, num_rows: int) -> None:
        self._replay.reset(self._num_slots if self._continuous else num_rows)

    def _prefill_all(self, into: _Difference) -> list[int]:
        """Every prompt in a row of its own; the rows."""
        slots = list(range(len(self._traces)))
        self._reset(len(slots))
        if not self._continuous:
            self._prefill(self._traces, slots, self._chunk_len, into)
            return slots
        slots = [self._num_slots - 1 - slot for slot in slots]
        for trace, slot in zip(self._traces, slots, strict=True):
            self._prefill([trace], [slot], self._chunk_len, into)
        return slots

    def _prefill(
        self, traces: Sequence[Trace], slots: Sequence[int], chunk_len: int, into: _Difference
    ) -> None:
        prompts = [trace.tokens[: trace.prompt_len] for trace in traces]
        for answer in self._replay.prefill(prompts, slots, chunk_len):
            into.add_answer(traces[answer.row], answer)
        self._compare_caches(traces, slots, 0, into)

    def _decode(self, traces: Sequence[Trace], slots: Sequence[int], into: _Difference) -> None:
        for step in range(NUM_DECODE_STEPS):
            tokens = [int(trace.tokens[trace.prompt_len + step]) for trace in traces]
            for answer in self._replay.decode(tokens, slots):
                into.add_answer(traces[answer.row], answer)
            self._compare_caches(traces, slots, step + 1, into)

    def _compare_caches(
        self, traces: Sequence[Trace], slots: Sequence[int], step: int, into: _Difference
    ) -> None:
        for trace, slot in zip(traces, slots, strict=True):
            into.add_cache(trace, self._replay.row(slot, trace.prompt_len + step))


class _Difference:
    """The largest differences over the rows of one scenario."""

    def __init__(self, scenario: str, num_copies: int) -> None:
        self._scenario = scenario
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

    def total(self) -> ScenarioDifference:
        logits, keys, values = (float(np.max(found)) for found in self._largest)
        return ScenarioDifference(
            self._scenario, logits, keys, values, len(self._top1), sum(self._top1)
        )


def _largest(got: Floats, expected: Floats) -> float:
    if got.shape != expected.shape:
        return math.inf
    return float(np.max(np.abs(got.astype(np.float32) - expected)))
