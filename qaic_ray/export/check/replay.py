"""Runs an exported graph on onnxruntime as an engine runs a card: chunks, slots, retained state.

The graph is changed first: its functions get the card's meaning of indices outside the cache,
layers may be left out, and the largest magnitude of each activation becomes an output: a card
computes in float16, where a larger value overflows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from qaic_ray import contract
from qaic_ray.contract import IoContract
from qaic_ray.export.functions import use_plain_functions
from qaic_ray.export.reference import mapped, take_inputs_out
from qaic_ray.model.checkpoint import ModelManifest

NUM_KEPT = 2
"""Length of `num_logits_to_keep`, where a graph has it and a run has as many tokens."""

EMBEDDING = "/model/embed_tokens/"
"""Scope of the first activations; values that do not depend on it are indices and masks."""

_LAYER = re.compile(r"^(?:/model/layers|past_key|past_value)\.(\d+)")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_PREFIX = "largest:"

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Activation:
    """The largest magnitude seen of a value of the graph; `layer` is None outside the layers."""

    layer: int | None
    name: str
    largest: float


@dataclass(frozen=True)
class ReplayAnswer:
    """Output of a run for the token at `position` of a row: logits, or one token id."""

    row: int
    position: int
    values: npt.NDArray[Any]


class _Replay:
    """A graph and the state that a card would retain; `open_replay` makes the contract's kind.

    Args:
        session: runs the graph as `onnxruntime.InferenceSession` does.
        manifest: of the model.
        layers: those that the graph has.
        ctx_len: of the cache.
        watched: outputs that tell an activation's largest magnitude, with the activation's name.
    """

    def __init__(
        self,
        session: Any,
        manifest: ModelManifest,
        layers: Sequence[int],
        *,
        ctx_len: int,
        watched: Mapping[str, str],
    ) -> None:
        self._session = session
        self._watched = watched
        self._manifest = manifest
        self._layers = tuple(layers)
        self._ctx_len = ctx_len
        self._past: dict[str, Any] = {}
        self._largest: dict[str, float] = {}

    def reset(self, num_rows: int) -> None:
        """Start with a cache of so many rows, full of noise, as on a card."""
        shape = (num_rows, self._manifest.num_kv_heads, self._ctx_len, self._manifest.head_dim)
        noise = np.random.default_rng(0).standard_normal(shape).astype(self._manifest.dtype)
        names = [n for i in self._layers for n in (contract.past_key(i), contract.past_value(i))]
        self._past = dict.fromkeys(names, noise)

    def activations(self) -> list[Activation]:
        """The largest magnitudes of all runs without padding."""
        return [Activation(layer_of(name), name, size) for name, size in self._largest.items()]

    def _start(self, slot: int) -> int:
        """The cache slot of a row's first token."""
        return 0

    def row(self, slot: int, num_tokens: int) -> tuple[list[Floats], list[Floats]]:
        """Keys and values of the first tokens of a row, a list over the layers."""
        seen = np.s_[slot, :, self._start(slot) : self._start(slot) + num_tokens]
        keys = [self._past[contract.past_key(i)][seen] for i in self._layers]
        values = [self._past[contract.past_value(i)][seen] for i in self._layers]
        return keys, values

    def _run(self, feed: Mapping[str, Any], positions: Ints) -> list[ReplayAnswer]:
        """The answers of one run; positions below 0 are padding."""
        manifest, feed = self._manifest, dict(feed)
        num_kept = min(NUM_KEPT, positions.shape[1])
        if manifest.logits == contract.NUM_LOGITS_TO_KEEP:
            feed[contract.NUM_LOGITS_TO_KEEP] = np.zeros((num_kept, 1), np.int64)
        if manifest.comp_ctx_lengths:
            # Only the length counts: as little of the context as there is.
            needed = max(1, int(positions.max()) + 1)
            feed[contract.COMP_CTX_LENGTHS] = np.zeros(needed, np.int64)
        first = contract.NEXT_TOKENS if manifest.next_tokens else contract.LOGITS
        outputs = [first, *(contract.retained(name) for name in self._past)]
        watched = list(self._watched)
        results = self._session.run(outputs + watched, feed | self._past)
        largest = results[len(outputs) :]
        # A padding row may hold anything: only runs without padding say what a card has to hold.
        if (positions >= 0).all():
            for name, value in zip(self._watched.values(), largest, strict=True):
                self._largest[name] = max(self._largest.get(name, 0.0), float(value))
        answer, *states = results[: len(outputs)]
        self._past = dict(zip(self._past, states, strict=True))
        return self._answers(answer, positions, num_kept)

    def _answers(self, answer: Any, positions: Ints, num_kept: int) -> list[ReplayAnswer]:
        num_rows, seq_len = positions.shape
        answer = np.asarray(answer).reshape(num_rows, -1, answer.shape[-1])
        num_columns = {"last": 1, "all": seq_len}.get(self._manifest.logits, num_kept)
        found = []
        for row in range(num_rows):
            last = int(positions[row].argmax())
            first = max(0, last + 1 - num_columns)
            for place, column in enumerate(range(first, first + num_columns)):
                if positions[row, column] >= 0:
                    found.append(ReplayAnswer(row, int(positions[row, column]), answer[row, place]))
        return found


class PositionIdsReplay(_Replay):
    """Rows padded on the right; each has its own positions, and a slot where they are continuous.

    Static rows keep their place, so `slots` are 0, 1, 2 there.
    """

    def reset(self, num_rows: int) -> None:
        super().reset(num_rows)
        self._lengths: dict[int, int] = {}

    def prefill(
        self, prompts: Sequence[Ints], slots: Sequence[int], chunk_len: int
    ) -> list[ReplayAnswer]:
        """Run prompts from their beginning, `chunk_len` tokens at once, in rows of the cache."""
        self._lengths |= dict.fromkeys(slots, 0)
        found = []
        for start in range(0, max(map(len, prompts)), chunk_len):
            chunks = [prompt[start : start + chunk_len] for prompt in prompts]
            found += self._step(chunks, slots, chunk_len)
        return found

    def decode(self, tokens: Sequence[int], slots: Sequence[int]) -> list[ReplayAnswer]:
        """Run one more token of every row."""
        return self.extend([[token] for token in tokens], slots)

    def extend(self, tokens: Sequence[Sequence[int]], slots: Sequence[int]) -> list[ReplayAnswer]:
        """Run more tokens of every row at once, as a check of drafted ones does."""
        return self._step(tokens, slots, max(map(len, tokens)))

    def _step(
        self, tokens: Sequence[Sequence[int] | Ints], slots: Sequence[int], seq_len: int
    ) -> list[ReplayAnswer]:
        ids = np.zeros((len(tokens), seq_len), np.int64)
        positions = np.full_like(ids, contract.PADDING_POSITION)
        for row, (more, slot) in enumerate(zip(tokens, slots, strict=True)):
            ids[row, : len(more)] = more
            positions[row, : len(more)] = np.arange(len(more)) + self._lengths[slot]
            self._lengths[slot] += len(more)
        feed = {contract.INPUT_IDS: ids, contract.POSITION_IDS: positions}
        if self._manifest.continuous:
            feed[contract.BATCH_INDEX] = np.array(slots, np.int64)[:, None]
        return self._run(feed, positions)


class CacheIndexReplay(_Replay):
    """Rows padded on the left to whole chunks, as the published recipe's runModel.py does."""

    def prefill(
        self, prompts: Sequence[Ints], slots: Sequence[int], chunk_len: int
    ) -> list[ReplayAnswer]:
        """See `PositionIdsReplay.prefill`; the rows are all of the cache."""
        lengths = np.array([len(prompt) for prompt in prompts])
        self._input_len = -(-int(lengths.max()) // chunk_len) * chunk_len
        self._lengths, self._cache_index = lengths, 0
        ids = np.zeros((len(prompts), self._input_len), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, self._input_len - len(prompt) :] = prompt
        positions = np.arange(self._input_len) - (self._input_len - lengths[:, None])
        found = []
        for start in range(0, self._input_len, chunk_len):
            stop = start + chunk_len
            mask = np.zeros((len(prompts), self._ctx_len), bool)
            mask[:, :stop] = positions[:, :stop] >= 0
            self._past[contract.ATTENTION_MASK] = mask
            found += self._step(ids[:, start:stop], positions[:, start:stop])
        return found

    def decode(self, tokens: Sequence[int], slots: Sequence[int]) -> list[ReplayAnswer]:
        """See `PositionIdsReplay.decode`."""
        positions = self._lengths[:, None] + (self._cache_index - self._input_len)
        return self._step(np.array(tokens, np.int64)[:, None], positions)

    def _start(self, slot: int) -> int:
        return self._input_len - int(self._lengths[slot])

    def _step(self, ids: Ints, positions: Ints) -> list[ReplayAnswer]:
        feed = {
            contract.INPUT_IDS: ids,
            contract.POSITION_IDS: np.maximum(positions, 0),
            contract.CACHE_INDEX: np.array([self._cache_index], np.int64),
        }
        self._cache_index += ids.shape[1]
        return self._run(feed, positions)


Replay = PositionIdsReplay | CacheIndexReplay


def replay_of(contract_: IoContract) -> type[PositionIdsReplay] | type[CacheIndexReplay]:
    """The kind of replay that feeds a contract."""
    return CacheIndexReplay if contract_ is IoContract.CACHE_INDEX else PositionIdsReplay


def open_replay(
    model_dir: Path, manifest: ModelManifest, layers: Sequence[int], ctx_len: int
) -> Replay:
    """An exported model on onnxruntime, with some of its layers."""
    import onnxruntime

    path = model_dir / manifest.onnx_file
    model = onnx.load(path, load_external_data=False)
    places = take_inputs_out(model, path)
    use_plain_functions(model)
    cut_layers(model, layers)
    watched = watch_activations(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    kept = {t.name: t.data_type for t in model.graph.initializer if t.name in places}
    values = [
        onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(mapped(places[name]), kind)
        for name, kind in kept.items()
    ]
    options.add_external_initializers(list(kept), values)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kind = replay_of(manifest.contract)
    return kind(session, manifest, layers, ctx_len=ctx_len, watched=watched)


def kept_layers(num_layers: int, level: str) -> tuple[int, ...]:
    """The layers that a check looks at: all, or the first and the last two."""
    if level == "full" or num_layers <= 4:
        return tuple(range(num_layers))
    return (0, 1, num_layers - 2, num_layers - 1)


def cut_layers(model: Any, keep: Sequence[int]) -> None:
    """Remove every other layer from an `onnx.ModelProto`, in place; its neighbours are joined.

    Layers keep their own numbers. What a removed layer would have handed on is replaced by what the
    kept layer below it hands on.
    """
    graph = model.graph
    results: dict[int, str] = {}
    for node in graph.node:
        if (layer := layer_of(node.name)) is not None:
            results[layer] = node.output[0]  # nodes are in order, so the last one stays
    renamed, below = {}, None
    for layer, result in sorted(results.items()):
        if layer in keep:
            below = result
        elif below is not None:
            renamed[result] = below
    nodes = [n for n in graph.node if layer_of(n.name) in (None, *keep)]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    used = {name for node in nodes for name in (*node.input, *node.output)}
    past = {
        name
        for layer in results.keys() - set(keep)
        for past in (contract.past_key(layer), contract.past_value(layer))
        for name in (past, contract.retained(past))
    }
    for field, kept in (
        (graph.node, nodes),
        (graph.input, [v for v in graph.input if v.name not in past]),
        (graph.output, [v for v in graph.output if v.name not in past]),
        (graph.value_info, [v for v in graph.value_info if v.name in used]),
        (graph.initializer, [t for t in graph.initializer if t.name in used]),
    ):
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        del field[:]
        field.extend(copies)


def watch_activations(model: Any) -> dict[str, str]:
    """Give an `onnx.ModelProto` one more scalar output for each of its activations, in place.

    Returns:
        Names of those outputs, each with the name of its activation.
    """
    graph = model.graph
    made = _activations(graph)
    watched = {}
    for value in [*graph.value_info, *graph.output]:
        kind = value.type.tensor_type.elem_type
        if kind not in _FLOATS or value.name not in made:
            continue
        name = _PREFIX + value.name
        wide, size = f"{name}/wide", f"{name}/size"
        graph.node.extend(
            [
                helper.make_node("Cast", [value.name], [wide], to=TensorProto.FLOAT),
                helper.make_node("Abs", [wide], [size]),
                helper.make_node("ReduceMax", [size], [name], keepdims=0),
            ]
        )
        watched[name] = value.name
    graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in watched)
    return watched


def _activations(graph: Any) -> set[str]:
    """Values that depend on the embedding, without masked scores, which are meant to be huge."""
    made: set[str] = set()
    producers = {}
    masked = set()
    for node in graph.node:
        producers[node.output[0]] = node
        if node.name.startswith(EMBEDDING) or made.intersection(node.input):
            made.update(node.output)
        if node.op_type == "Softmax":
            before = producers[node.input[0]]
            masked |= {node.input[0], *(before.input if before.op_type == "Cast" else ())}
    return made - masked


def layer_of(name: str) -> int | None:
    """The layer of a node or a cache, by its name; None outside the layers."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None
