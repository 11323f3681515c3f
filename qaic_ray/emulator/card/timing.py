"""Card time: a stated latency model that pads the compute, or stands in for it.

Off unless `QAIC_EMULATOR_TIMING` names a YAML or JSON file; its keys are in
`docs/emulated-sdk/faults.md`. The time of an inference is base_ms + per_token_ms * tokens + weights
/ (bandwidth_gb_s * efficiency). While it is on, `QAIC_EMULATOR_TIMING_ACTIVE` is set in the process
to one line that states the model, so that every report of a figure can print it. These times are
simulated.
"""

from __future__ import annotations

import os
import time
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type

import numpy as np

from ..documents import is_number, parse_mapping, read_text, shown

VARIABLE = "QAIC_EMULATOR_TIMING"
ECHO_VARIABLE = "QAIC_EMULATOR_TIMING_ACTIVE"
PAD = "pad"
REPLACE = "replace"

_NUMBERS = {
    "base_ms": 0.0,
    "per_token_ms": 0.0,
    "bandwidth_gb_s": 0.0,
    "efficiency": 1.0,
    "load_gb_s": 0.0,
    "seed": 0.0,
}
_MASK = (1 << 64) - 1
_LEAST_VOCABULARY = 256
"""Tokens that any model has: where there are no logits, nothing says how many it has."""


class TimingFileError(ValueError):
    """The timing file cannot be used; the message says why."""


class LatencyModel(NamedTuple):
    """The stated latency model; 0 for a rate means that it costs no time."""

    mode: str
    base_ms: float
    per_token_ms: float
    bandwidth_gb_s: float
    efficiency: float
    load_gb_s: float
    seed: int

    def inference_s(self, num_tokens: int, weight_bytes: int) -> float:
        """Card time of one inference over `num_tokens` tokens."""
        seconds = (self.base_ms + self.per_token_ms * num_tokens) / 1e3
        if self.bandwidth_gb_s:
            seconds += weight_bytes / (self.bandwidth_gb_s * self.efficiency * 1e9)
        return seconds

    def load_s(self, weight_bytes: int) -> float:
        """Card time of loading a program."""
        return weight_bytes / (self.load_gb_s * 1e9) if self.load_gb_s else 0.0

    def statement(self) -> str:
        """The model in one line, for reports."""
        numbers = ", ".join(f"{name} {getattr(self, name):g}" for name in _NUMBERS)
        return f"simulated card time ({self.mode}): {numbers}"


def from_environment() -> Optional[LatencyModel]:
    """The model of the file that `QAIC_EMULATOR_TIMING` names, None when it is not set."""
    named = os.environ.get(VARIABLE)
    if not named:
        os.environ.pop(ECHO_VARIABLE, None)
        return None
    model = parse(read_text(named, TimingFileError, VARIABLE), named)
    os.environ[ECHO_VARIABLE] = model.statement()
    return model


def parse(text: str, name: str) -> LatencyModel:
    """The model in a file's text; `name` is for the messages."""
    content = parse_mapping(text, name, TimingFileError)
    mode = content.pop("mode", None)
    if mode not in (PAD, REPLACE):
        raise TimingFileError(f"{name}: `mode` must be {PAD} or {REPLACE}, not {shown(mode)}")
    values: Dict[str, float] = dict(_NUMBERS)
    for key, value in content.items():
        if key not in values:
            raise TimingFileError(
                f"{name}: unknown key {shown(key)}; known are {', '.join(values)}"
            )
        if not is_number(value) or value < 0:
            raise TimingFileError(
                f"{name}: `{key}` must be a number of 0 or more, not {shown(value)}"
            )
        values[key] = float(value)
    if not 0 < values["efficiency"] <= 1:
        raise TimingFileError(f"{name}: `efficiency` must be above 0 and at most 1")
    seed = int(values.pop("seed"))
    return LatencyModel(mode=mode, seed=seed, **values)


def num_tokens(inputs: Mapping[str, np.ndarray]) -> int:
    """Tokens that an inference works on: the elements of `input_ids`, 1 where there is none."""
    ids = inputs.get("input_ids")
    return 1 if ids is None else int(ids.size)


class Stopwatch:
    """Makes an inference last at least as long as the model says."""

    def __init__(self, model: Optional[LatencyModel]) -> None:
        self._model = model
        self._start = time.monotonic()

    def wait_inference(self, inputs: Mapping[str, np.ndarray], weight_bytes: int) -> None:
        """Sleep until the inference's time has passed; nothing when no model is on."""
        if self._model is not None:
            self._wait(self._model.inference_s(num_tokens(inputs), weight_bytes))

    def wait_load(self, weight_bytes: int) -> None:
        """Sleep until the loading time has passed."""
        if self._model is not None:
            self._wait(self._model.load_s(weight_bytes))

    def _wait(self, seconds: float) -> None:
        left = self._start + seconds - time.monotonic()
        if left > 0:
            time.sleep(left)


class SimulatedProgram:
    """Takes the place of a loaded program in mode `replace`: right shapes, no weights."""

    def __init__(self, qpc: Any, model: LatencyModel, no_match: Type[Exception]) -> None:
        self._qpc = qpc
        self._model = model
        self._no_match = no_match

    def activate(self) -> SimulatedProgram:
        """An activation; it has no state, so it is this program itself."""
        return self

    def reset(self) -> None:
        """Forget the retained state, of which there is none."""

    def operator_profiles(self) -> List[str]:
        """Nothing: no operator is run."""
        return []

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, Tuple[int, ...]]
    ) -> Dict[str, np.ndarray]:
        """Zeros of the wanted shapes, but for the rule's tokens.

        `logits` have a one at the rule's token, `next_tokens` are those tokens.
        """
        self._check_shapes({**{name: a.shape for name, a in inputs.items()}, **outputs})
        types = {binding.name: binding.dtype for binding in self._qpc.bindings}
        results = {name: np.zeros(dims, types[name]) for name, dims in outputs.items()}
        if "input_ids" in inputs:
            if "logits" in results:
                self._fill_logits(results["logits"], inputs)
            if "next_tokens" in results:
                self._fill_tokens(results["next_tokens"], inputs)
        return results

    def _check_shapes(self, given: Mapping[str, Tuple[int, ...]]) -> None:
        names = [binding.name for binding in self._qpc.bindings]
        default: List[Tuple[int, ...]] = [tuple(b.dims) for b in self._qpc.bindings]
        allowed = [[tuple(dims) for _, dims in spec] for spec in self._qpc.allowed_shapes]
        for dims in allowed or [default]:
            if all(tuple(given.get(name, d)) == d for name, d in zip(names, dims)):
                return
        raise self._no_match("No matching dimension found")

    def _fill_logits(self, logits: np.ndarray, inputs: Mapping[str, np.ndarray]) -> None:
        rows = logits.reshape(logits.shape[0], -1, logits.shape[-1])
        tokens = self._tokens(inputs, rows.shape[1]) % rows.shape[2]
        np.put_along_axis(rows, tokens[:, :, None], 1.0, axis=2)

    def _fill_tokens(self, next_tokens: np.ndarray, inputs: Mapping[str, np.ndarray]) -> None:
        rows = next_tokens.reshape(next_tokens.shape[0], -1)
        rows[:] = self._tokens(inputs, rows.shape[1]) % _LEAST_VOCABULARY

    def _tokens(self, inputs: Mapping[str, np.ndarray], num_kept: int) -> np.ndarray:
        """The rule's tokens after so many tokens of each row: its last ones, or its first ones."""
        ids = inputs["input_ids"]
        positions = inputs.get("position_ids", np.broadcast_to(np.arange(ids.shape[1]), ids.shape))
        tokens = np.zeros((len(ids), num_kept), np.int64)
        for row, last in enumerate(positions.argmax(axis=1).tolist()):
            first = max(0, last + 1 - num_kept)
            for k, at in enumerate(range(first, min(first + num_kept, ids.shape[1]))):
                tokens[row, k] = self._next_token(int(ids[row, at]), int(positions[row, at]))
        return tokens

    def _next_token(self, token: int, position: int) -> int:
        mixed = (token * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ self._model.seed) * 0x94D049BB133111EB) & _MASK
        return (mixed ^ (mixed >> 31)) >> 8
