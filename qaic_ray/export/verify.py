"""Holds an exported graph against PyTorch: the same prompts through both, differences as data.

The graph runs on onnxruntime with the meaning that a card gives to indices outside the cache
written into its functions. Prints nothing, and needs nothing but a model folder and its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qaic_ray import contract
from qaic_ray.errors import ExportError, UsageError
from qaic_ray.export.architecture import Architecture
from qaic_ray.export.cut import cut_layers, kept_layers
from qaic_ray.export.functions import use_plain_functions
from qaic_ray.export.weights import FLOAT16_MAX
from qaic_ray.manifest import VERIFY_FILE, ModelManifest, read_manifest
from qaic_ray.model import Checkpoint, has_tokenizer, load_tokenizer, load_torch_model

PROMPTS = (
    "My name is",
    "The capital of France is Paris, and the river that flows through the old town is called the",
)
NUM_DECODE_STEPS = 2
FLOAT32_TOLERANCE = 2e-3
"""Largest difference of a float32 logit that passes."""
FLOAT16_TOLERANCE = 2e-2
"""The same for a float16 graph, as a part of the largest logit: its weights are rounded."""
FULL_PARAMETERS = 2_000_000_000
"""Models below this are checked with all their layers by default."""

_CTX_LEN = 64
_CHUNK_LEN = 8
_NUM_SLOTS = 3

Floats = npt.NDArray[np.floating]


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
    """The outcome of `verify_export`; `layers` are those that were looked at."""

    level: str
    layers: tuple[int, ...]
    ctx_len: int
    tolerance: float
    scenarios: tuple[ScenarioDifference, ...]

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
    """`full` for what runs in the memory of a workstation, else `quick`."""
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
    layers = kept_layers(manifest.num_layers, level)
    ctx_len = min(_CTX_LEN, manifest.max_position)
    prompts = _prompt_ids(checkpoint, manifest, longest=ctx_len - NUM_DECODE_STEPS - 1)
    traces = _trace(checkpoint, manifest, layers, prompts)
    graph = _Graph(model_dir / manifest.onnx_file, manifest, layers, ctx_len)
    scenarios = _Scenarios(graph, traces)
    scenarios.prefill_and_decode()
    scenarios.chunked_prefill()
    scenarios.mixed_batch()
    if manifest.continuous:
        scenarios.slot_reuse()
    tolerance = FLOAT32_TOLERANCE
    if manifest.dtype == "float16":
        tolerance = FLOAT16_TOLERANCE * max(float(np.abs(t.logits).max()) for t in traces)
    return VerifyReport(level, layers, ctx_len, tolerance, tuple(scenarios.differences))


def write_report(report: VerifyReport, model_dir: Path) -> None:
    """Put `verify.json` into a model folder, whole or not at all."""
    path = model_dir / VERIFY_FILE
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(asdict(report) | {"passed": report.passed}, indent=2) + "\n")
    os.replace(partial, path)


def read_report(model_dir: Path) -> VerifyReport | None:
    """The report of an earlier verification of a folder, None where there was none."""
    path = model_dir / VERIFY_FILE
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields.pop("passed")
        fields["layers"] = tuple(fields["layers"])
        fields["scenarios"] = tuple(ScenarioDifference(**s) for s in fields["scenarios"])
        return VerifyReport(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}); delete it and verify again.") from error


@dataclass(frozen=True)
class _Trace:
    """What PyTorch does with one prompt: logits after it and after each decoded token.

    `tokens` is the prompt and the tokens decoded from it; `keys` and `values` have a row [heads,
    tokens, head_dim] for every layer.
    """

    prompt_len: int
    tokens: npt.NDArray[np.int64]
    logits: Floats
    keys: list[Floats]
    values: list[Floats]


def _prompt_ids(
    checkpoint: Checkpoint, manifest: ModelManifest, *, longest: int
) -> list[list[int]]:
    if has_tokenizer(checkpoint):
        encode = load_tokenizer(checkpoint).encode
        return [encode(prompt)[:longest] for prompt in PROMPTS]
    # A checkpoint without a tokenizer still has a graph to check; its tokens have no meaning.
    raw = [list(prompt.encode()) for prompt in PROMPTS]
    return [[byte % manifest.vocab_size for byte in prompt][:longest] for prompt in raw]


def _trace(
    checkpoint: Checkpoint,
    manifest: ModelManifest,
    layers: Sequence[int],
    prompts: Sequence[Sequence[int]],
) -> list[_Trace]:
    import torch

    every = len(layers) == manifest.num_layers
    model = load_torch_model(checkpoint, layers=None if every else layers)
    if manifest.num_clipped:
        for parameter in model.parameters():
            clipped = parameter.clamp(-FLOAT16_MAX, FLOAT16_MAX)
            parameter.data = torch.where(parameter.isneginf(), parameter, clipped)
    traces = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens, logits = list(prompt), []
            cache: Any = None
            for _ in range(NUM_DECODE_STEPS + 1):
                fresh = tokens if cache is None else tokens[-1:]
                result = model(torch.tensor([fresh]), past_key_values=cache, use_cache=True)
                cache = result.past_key_values
                logits.append(result.logits[0, -1].numpy())
                tokens.append(int(logits[-1].argmax()))
            keys = [layer.keys[0].numpy() for layer in cache.layers]
            values = [layer.values[0].numpy() for layer in cache.layers]
            ids = np.array(tokens[:-1], np.int64)
            traces.append(_Trace(len(prompt), ids, np.stack(logits), keys, values))
    return traces


class _Graph:
    """The exported graph on onnxruntime, with the state that a card would retain."""

    def __init__(
        self, path: Path, manifest: ModelManifest, layers: Sequence[int], ctx_len: int
    ) -> None:
        import onnxruntime

        model = onnx.load(path, load_external_data=False)
        use_plain_functions(model)
        cut_layers(model, layers)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.continuous = manifest.continuous
        self.layers = tuple(layers)
        self._shape = (manifest.num_kv_heads, ctx_len, manifest.head_dim)
        self._dtype = np.dtype(manifest.dtype)
        self._past: dict[str, Any] = {}

    def reset(self, num_rows: int) -> None:
        """Empty rows of cache; what is in them is noise, as on a card."""
        noise = np.random.default_rng(0).standard_normal((num_rows, *self._shape))
        names = [n for i in self.layers for n in (contract.past_key(i), contract.past_value(i))]
        self._past = {name: noise.astype(self._dtype) for name in names}

    def run(
        self, ids: npt.ArrayLike, positions: npt.ArrayLike, slots: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Logits [rows, vocab] of [rows, seq] tokens; `slots` are rows of a continuous cache."""
        feed: dict[str, Any] = {
            contract.INPUT_IDS: np.asarray(ids, np.int64),
            contract.POSITION_IDS: np.asarray(positions, np.int64),
            **self._past,
        }
        if self.continuous:
            feed[contract.BATCH_INDEX] = np.asarray(slots, np.int64)[:, None]
        outputs = [contract.LOGITS, *(contract.retained(name) for name in self._past)]
        logits, *past = self._session.run(outputs, feed)
        self._past = dict(zip(self._past, past, strict=True))
        return np.asarray(logits)[:, 0]

    def row(self, slot: int, num_tokens: int) -> tuple[list[Floats], list[Floats]]:
        """Keys and values of the first tokens of a row, a list over the layers."""
        keys = [self._past[contract.past_key(i)][slot, :, :num_tokens] for i in self.layers]
        values = [self._past[contract.past_value(i)][slot, :, :num_tokens] for i in self.layers]
        return keys, values


class _Scenarios:
    def __init__(self, graph: _Graph, traces: Sequence[_Trace]) -> None:
        self._graph = graph
        self._traces = traces
        self.differences: list[ScenarioDifference] = []

    def prefill_and_decode(self) -> None:
        """Each prompt alone, in one prefill, and then its decode steps."""
        graph = self._graph
        prefill, decode = _Difference("prefill"), _Difference("decode")
        for trace in self._traces:
            graph.reset(_NUM_SLOTS if graph.continuous else 1)
            self._prefill(trace, 0, trace.prompt_len, prefill)
            self._decode([trace], [0], decode)
        self.differences += [prefill.total(), decode.total()]

    def chunked_prefill(self) -> None:
        """The longest prompt in chunks, the last of them padded."""
        graph, difference = self._graph, _Difference("chunked prefill")
        trace = max(self._traces, key=lambda t: t.prompt_len)
        graph.reset(_NUM_SLOTS if graph.continuous else 1)
        self._prefill(trace, 0, _CHUNK_LEN, difference)
        self._decode([trace], [0], difference)
        self.differences.append(difference.total())

    def mixed_batch(self) -> None:
        """Prompts of different lengths decoded together."""
        graph, difference = self._graph, _Difference("mixed batch")
        rows = list(range(len(self._traces)))
        if graph.continuous:
            graph.reset(_NUM_SLOTS)
            slots = [_NUM_SLOTS - 1 - row for row in rows]
            for trace, slot in zip(self._traces, slots, strict=True):
                self._prefill(trace, slot, _CHUNK_LEN, difference)
        else:
            graph.reset(len(rows))
            slots = rows
            self._prefill_together(difference)
        self._decode(self._traces, slots, difference)
        self.differences.append(difference.total())

    def slot_reuse(self) -> None:
        """A short prompt in the slot that a longer one has left."""
        graph, difference = self._graph, _Difference("slot reuse")
        long, short = sorted(self._traces, key=lambda t: -t.prompt_len)[:2]
        graph.reset(_NUM_SLOTS)
        self._prefill(long, 1, _CHUNK_LEN, _Difference("left behind"))
        self._prefill(short, 1, _CHUNK_LEN, difference)
        self._decode([short], [1], difference)
        self.differences.append(difference.total())

    def _prefill(self, trace: _Trace, slot: int, chunk_len: int, into: _Difference) -> None:
        for start in range(0, trace.prompt_len, chunk_len):
            ids, positions = _chunk(trace, start, chunk_len)
            logits = self._graph.run([ids], [positions], [slot])
        into.add(trace, 0, logits[0], self._graph.row(slot, trace.prompt_len))

    def _prefill_together(self, into: _Difference) -> None:
        """One static batch: shorter rows have chunks of nothing but padding at the end."""
        last: dict[int, Floats] = {}
        for start in range(0, max(t.prompt_len for t in self._traces), _CHUNK_LEN):
            chunks = [_chunk(trace, start, _CHUNK_LEN) for trace in self._traces]
            ids, positions = zip(*chunks, strict=True)
            logits = self._graph.run(ids, positions, range(len(chunks)))
            last |= {i: logits[i] for i, t in enumerate(self._traces) if start < t.prompt_len}
        for i, trace in enumerate(self._traces):
            into.add(trace, 0, last[i], self._graph.row(i, trace.prompt_len))

    def _decode(self, traces: Sequence[_Trace], slots: Sequence[int], into: _Difference) -> None:
        for step in range(NUM_DECODE_STEPS):
            at = [trace.prompt_len + step for trace in traces]
            ids = [[trace.tokens[p]] for trace, p in zip(traces, at, strict=True)]
            logits = self._graph.run(ids, [[p] for p in at], slots)
            for i, trace in enumerate(traces):
                into.add(trace, step + 1, logits[i], self._graph.row(slots[i], at[i] + 1))


def _chunk(trace: _Trace, start: int, length: int) -> tuple[list[int], list[int]]:
    ids = trace.tokens[: trace.prompt_len][start : start + length].tolist()
    padding = length - len(ids)
    positions = list(range(start, start + len(ids)))
    return ids + [0] * padding, positions + [contract.PADDING_POSITION] * padding


class _Difference:
    """Grows over the rows of one scenario."""

    def __init__(self, scenario: str) -> None:
        self._scenario = scenario
        self._largest: list[list[float]] = [[0.0], [0.0], [0.0]]
        self._top1: list[bool] = []

    def add(
        self, trace: _Trace, step: int, logits: Floats, past: tuple[list[Floats], list[Floats]]
    ) -> None:
        """Compare the state after `step` decoded tokens."""
        expected = trace.logits[step]
        self._largest[0].append(_largest(logits, expected))
        self._top1.append(int(logits.argmax()) == int(expected.argmax()))
        for which, (got, truth) in enumerate(zip(past, (trace.keys, trace.values), strict=True)):
            for layer, layer_truth in zip(got, truth, strict=True):
                seen = layer_truth[:, : layer.shape[1]]
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
