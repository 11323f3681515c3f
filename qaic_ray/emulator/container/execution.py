"""What runs: a parsed QPC, its weights in memory, and activations with their retained state.

Computing is float32 on the CPU, with weights rounded as the compiler was told, and with the KV
cache rounded to what the card would hold.

Covered: values of weights and cache as the flags round them; shapes, partial buffers, retained
state. Inferred: that `-convert-to-fp16` alone makes the cache float16. Not covered: rounding of
activations between operators to float16, and the order of sums inside a card.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from ..card.cores import Cores, usable_cores
from ..lowering.attention import ATTENTION_MASK, CACHE_INDEX, joint_length
from ..lowering.lowered import LoweredState, Probe, Runner
from ..lowering.view import ORT_ERRORS
from ..numbers import kv_cache
from ..step.errors import TokenError
from . import QpcError, network
from .compiled import CompiledProgram as CompiledProgram
from .constants import Weights, packs_into_its_own_memory
from .lockstep import LockstepState
from .steps import EXACT, open_step

_log = logging.getLogger(__name__)
_SMALL_CACHE = 1 << 20


class NoMatchingDimension(Exception):
    """The shapes of one run are not those of any specialization."""


class ShapeError(Exception):
    """An input that is missing, unknown or of the wrong size for its binding."""


class ExecutionError(ShapeError):
    """The graph cannot compute these values, for example a token beyond the vocabulary."""


def num_threads_of_environment() -> int:
    """Threads of one inference at most: `QAIC_EMULATOR_THREADS`, else all CPUs that are ours."""
    text = os.environ.get("QAIC_EMULATOR_THREADS", "")
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    return usable_cores()


class LoadedProgram:
    """A program with its constants decoded to memory; shared by its activations.

    Args:
        qpc: the program.
        num_threads: threads of one inference, at most.
        use_lowered: whether to run the lowered graph where the compiler made one.
        use_step: whether to run it as a compiled step where there is one.
        numerics: `exact`, or `fast`: activations are rounded to 8 bits a block of 32.
        cores: what this machine's cards share; None for a card that is alone.
        measures_operators: whether onnxruntime measures its operators, for `operator_profiles`.

    Attributes:
        step: the compiled step, None where there is none.
        lowered: onnxruntime's session of the lowered graph, None where it is not used.
    """

    def __init__(
        self,
        qpc: CompiledProgram,
        num_threads: int,
        *,
        use_lowered: bool = True,
        use_step: bool = True,
        numerics: str = EXACT,
        cores: Optional[Cores] = None,
        measures_operators: bool = False,
    ) -> None:
        self.qpc = qpc
        self._profiles = ""
        if measures_operators:
            self._profiles = tempfile.mkdtemp(prefix="qaic-emulator-")
            weakref.finalize(self, shutil.rmtree, self._profiles, ignore_errors=True)
        self._profiled: List[Any] = []
        self.numerics = numerics
        self._cores = Cores(None, num_threads) if cores is None else cores
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._constants = {c.name: c for c in qpc.program.constants}
        self._reference: Any = None
        self._joint: Any = None
        # What the lowered graph keeps between runs; it has no attention mask.
        self.caches = {n: out for n, out in qpc.states.items() if n != ATTENTION_MASK}
        self.joint_length = 0
        self.lowered: Any = None
        self.step: Any = None
        if use_lowered and network.LOWERED in qpc.graphs:
            if use_step:
                self.step = self._open_step()
            if self.step is None:
                self.lowered = self._lowered_session()
        if self.step is not None:
            return
        if self.lowered is None:
            self.reference()
        elif network.JOINT in qpc.graphs:
            self.joint_length = joint_length(self._model(network.JOINT))

    def reference(self) -> Any:
        """The session of the reference graph, made when it is first needed."""
        with self._lock:
            if self._reference is None:
                self._reference, self._reference_weights = self._session(network.REFERENCE)
                if packs_into_its_own_memory():
                    self._reference_weights.release()
            return self._reference

    def joint(self) -> Any:
        """The session of the graph of joint rows, made when it is first needed; None: not sound."""
        with self._lock:
            if self._joint is None and self.joint_length:
                self._joint = self._joint_session()
                if self._joint is None:
                    self.joint_length = 0
            return self._joint

    def activate(self) -> Activation:
        """A new activation, with its retained state all zero."""
        return Activation(self)

    def threads(self) -> Any:
        """A context that gives the threads of an inference that begins now."""
        return self._cores.share(self._num_threads)

    def _open_step(self) -> Any:
        segment, program = self.qpc.constants_segment(), self.qpc.program
        model = self._model(network.LOWERED)
        return open_step(
            self.qpc.name,
            model,
            self._constants,
            segment,
            roundings=program.roundings,
            numerics=self.numerics,
            digest=self.qpc.digest(),
        )

    def _model(self, name: str) -> Any:
        try:
            return onnx.ModelProto.FromString(self.qpc.graphs[name])
        except DecodeError as error:
            raise QpcError(f"a graph of {self.qpc.path} cannot be parsed") from error

    def _session(self, name: str) -> Tuple[Any, Weights]:
        model = self._model(name)
        weights = Weights(model, self._constants, self.qpc.constants_segment())
        prefix = self._profiles and os.path.join(self._profiles, name)
        session = weights.session(model, self._num_threads, prefix)
        if prefix:
            self._profiled.append(session)
        return session, weights

    def operator_profiles(self) -> List[str]:
        """What onnxruntime measured until now, as its JSON; a compiled step has no operators."""
        sessions, self._profiled = self._profiled, []
        return [Path(session.end_profiling()).read_text("utf-8") for session in sessions]

    def _lowered_session(self) -> Any:
        """The lowered session with its weights in memory once; None where it is not sound."""
        try:
            session, self._weights = self._session(network.LOWERED)
            probe = Probe(session, self.caches)
            self._weights.release()
            if probe.holds():
                return session
            self._weights.restore()
            if probe.holds():
                return session
            reason = "other results for the same tokens in other forms"
        except (QpcError, *ORT_ERRORS) as error:
            reason = str(error)
        _log.warning("%s runs without faster operators: %s", self.qpc.name, reason)
        return None

    def _joint_session(self) -> Any:
        try:
            session, self._joint_weights = self._session(network.JOINT)
            if packs_into_its_own_memory():
                self._joint_weights.release()
            if Probe(self.lowered, self.caches).joins(session):
                return session
            reason = "joint rows have other results"
        except (QpcError, *ORT_ERRORS) as error:
            reason = str(error)
        _log.warning("%s runs rows of several tokens one by one: %s", self.qpc.name, reason)
        return None


def _empty_cache(dims: Tuple[int, ...], kind: Any) -> Any:
    """Zeros that take memory where something is written: large pages would take it all at once."""
    size = math.prod(dims) * kind.itemsize
    if size < _SMALL_CACHE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(dims, kind)
    # Private: what a forked child writes is its own.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, kind).reshape(dims)


class Activation:
    """One activation: holds the retained state between runs. Safe to use from several threads."""

    def __init__(self, program: LoadedProgram) -> None:
        self._program = program
        self._qpc = program.qpc
        self._lock = threading.Lock()
        self._packed = set(self._qpc.program.mxint8)
        self._bindings = {b.name: b for b in self._qpc.bindings}
        self._kinds = {n: np.dtype(k) for n, k in self._qpc.program.input_kinds.items()}
        self._shapes = self._specializations()
        self.reset()

    def reset(self) -> None:
        """Set every retained state to zero."""
        self._states = {
            name: _empty_cache(self._compute_dims(name), self._kept_kind(name))
            for name in self._qpc.states
        }
        self._lowered: Any = None
        self._lockstep: Optional[LockstepState] = None
        program = self._program
        if program.step is not None:
            from ..step.runner import StepState

            caches = {name: self._states[name] for name in program.caches}
            self._lowered = StepState(program.step, caches, program.threads)
        elif program.lowered is not None:
            runner = self._runner(program.lowered)
            self._lowered = LoweredState(runner, self._joint, program.joint_length)
        if self._lowered is not None and CACHE_INDEX in self._kinds:
            run = self._lowered.run
            self._lockstep = LockstepState(run, self._states, self._next_states)

    def _kept_kind(self, name: str) -> Any:
        """The type that a state is kept in: the step reads a float16 cache as it is."""
        rounding = self._qpc.program.roundings.get(name)
        is_half = self._program.step is not None and rounding == kv_cache.FLOAT16
        return np.dtype(np.float16) if is_half else self._kinds[name]

    def _joint(self) -> Optional[Runner]:
        session = self._program.joint()
        return None if session is None else self._runner(session)

    def _runner(self, session: Any) -> Runner:
        caches = self._program.caches
        return Runner(session, {name: self._states[name] for name in caches}, caches)

    def run(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Tuple[int, ...]]
    ) -> Dict[str, Any]:
        """One inference.

        Args:
            inputs: arrays by binding name, in the binding's dtype. A retained input that is
                missing takes the state that the activation holds.
            outputs: wanted output -> dims of the caller's buffer. A retained output that is
                missing stays on the card.

        Returns:
            The wanted outputs, in their bindings' dtypes.

        Raises:
            NoMatchingDimension: where no specialization has these shapes.
            ShapeError: for a name that is no binding, or an input that cannot be left out.
        """
        self._check(inputs, outputs)
        with self._lock:
            caches = self._program.caches
            if not caches.keys().isdisjoint(inputs):
                self._settle(replaced=True)
            feeds = {}
            for name, array in inputs.items():
                values = self._to_compute(name, array)
                if name in self._states:
                    kind = self._qpc.program.roundings.get(name)
                    np.copyto(self._states[name], kv_cache.rounded(kind, values))
                else:
                    feeds[name] = values
            try:
                made = self._compute(feeds)
                if not outputs.keys().isdisjoint(caches.values()):
                    self._settle()
            except (TokenError, *ORT_ERRORS) as error:
                raise ExecutionError(f"{self._qpc.name}: {error}") from error
            made.update({out: self._states[name] for name, out in self._qpc.states.items()})
            return {
                name: self._to_buffer(name, made[name]).reshape(dims)
                for name, dims in outputs.items()
            }

    def state(self, name: str) -> Any:
        """What a retained input holds now, as it is computed with."""
        with self._lock:
            if name in self._program.caches:
                self._settle()
            return self._computed_with(name)

    def _computed_with(self, name: str) -> Any:
        return self._states[name].astype(self._kinds[name], copy=False)

    def _settle(self, *, replaced: bool = False) -> None:
        """Have the caches as the reference graph has them; `replaced`: to be given anew."""
        if self._lockstep is not None:
            self._lockstep.settle()
            if replaced:
                self._lockstep.replaced()

    def _compute(self, feeds: Mapping[str, Any]) -> Dict[str, Any]:
        faster = self._lockstep or self._lowered
        made = None if faster is None else faster.run(feeds)
        return self._run_reference(feeds) if made is None else made

    def _run_reference(self, feeds: Mapping[str, Any]) -> Dict[str, Any]:
        made = self._reference_outputs(feeds)
        for name, out in self._qpc.states.items():
            np.copyto(self._states[name], made.pop(out))
        return made

    def _next_states(self, feeds: Mapping[str, Any]) -> Dict[str, Any]:
        made = self._reference_outputs(feeds)
        return {name: made[out] for name, out in self._qpc.states.items()}

    def _reference_outputs(self, feeds: Mapping[str, Any]) -> Dict[str, Any]:
        """What the reference graph makes of inputs and states; what is not among inputs is held."""
        session = self._program.reference()
        names = [o.name for o in session.get_outputs()]
        states = {name: self._computed_with(name) for name in self._states}
        return dict(zip(names, session.run(names, dict(states, **feeds))))

    def _compute_dims(self, name: str) -> Tuple[int, ...]:
        dims = self._bindings[name].dims
        if name not in self._packed:
            return dims
        return (*dims[:-1], dims[-1] // kv_cache.BLOCK_BYTES * kv_cache.BLOCK)

    def _to_compute(self, name: str, array: Any) -> Any:
        kind = self._kinds[name]
        if name in self._packed:
            packed = array.view(np.uint8).reshape(*array.shape[:-1], -1, kv_cache.BLOCK_BYTES)
            return kv_cache.decode(packed, packed.shape[-2] * kv_cache.BLOCK)
        values = array != 0 if kind == np.bool_ else array.astype(kind, copy=False)
        return np.ascontiguousarray(values)

    def _to_buffer(self, name: str, array: Any) -> Any:
        if name in self._packed:
            return kv_cache.encode(array).reshape(*array.shape[:-1], -1).view(np.int8)
        with np.errstate(over="ignore"):
            copy = name in self._qpc.states.values()
            return array.astype(self._bindings[name].dtype, copy=copy)

    def _check(self, inputs: Mapping[str, Any], outputs: Mapping[str, Tuple[int, ...]]) -> None:
        for name in list(inputs) + list(outputs):
            if name not in self._bindings or self._bindings[name].is_input != (name in inputs):
                raise ShapeError(f"'{name}' is no binding of {self._qpc.name}")
        for b in self._qpc.bindings:
            missing = b.name not in (inputs if b.is_input else outputs)
            if missing and b.is_input and b.name not in self._qpc.states:
                raise ShapeError(f"input '{b.name}' is missing")
        given = {name: tuple(array.shape) for name, array in inputs.items()}
        given.update({name: tuple(dims) for name, dims in outputs.items()})
        for shapes in self._shapes:
            if all(shapes[name] == dims for name, dims in given.items()):
                return
        shown = ", ".join(f"{n}{list(d)}" for n, d in sorted(given.items()))
        raise NoMatchingDimension(f"No matching dimension found for {shown}")

    def _specializations(self) -> List[Dict[str, Tuple[int, ...]]]:
        names = [b.name for b in self._qpc.bindings]
        if not self._qpc.allowed_shapes:
            return [{b.name: b.dims for b in self._qpc.bindings}]
        return [
            {name: dims for name, (_, dims) in zip(names, shapes)}
            for shapes in self._qpc.allowed_shapes
        ]
