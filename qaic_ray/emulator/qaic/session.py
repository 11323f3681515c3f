"""`qaic.Session`: a model on a device behind `run(dict) -> dict`."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import numpy as np

from .. import qaicrt
from ..container import FILE_NAME
from ..container.netdesc import Binding
from .compiled_beside import compiled
from .hosting import Flight, HostedProgram, Hosting
from .measurements import Latencies, Profiles
from .options import SessionOptions, read_options, updated
from .streaming import stream

DEFAULT_NUM_INFERENCES = 40

_SEED = 0


class ShapeDict(Dict[str, Tuple[Tuple[int, ...], Any]]):
    """Name -> (shape, dtype). Documented as a call and used as an attribute, so it is both."""

    def __call__(self) -> ShapeDict:
        return self


class Session:
    """A model on a device; it is loaded by `setup` or by the first `run`.

    Args:
        model_path: an ONNX file, `programqpc.bin`, or the folder that holds one.
        options_path: a YAML file of options; `-` and `_` mean the same in their names.
        **options: the documented options, which win over the file. For an ONNX file they are the
            compiler's too; a QPC is compiled already, and those are not used.

    Raises:
        FileNotFoundError: where there is no model.
        ValueError: for options that are unknown or do not fit.
        RuntimeError: where the compiler or the runtime refuses the model, in their words.
    """

    def __init__(self, model_path: str, options_path: Optional[str] = None, **options: Any) -> None:
        self._options = read_options(options_path, options)
        self._lock = threading.RLock()
        self._host: Optional[HostedProgram] = None
        self._latencies = Latencies()
        self._profiles = Profiles()
        self._qpc_path = _qpc_of(Path(model_path), self._options)
        bindings = qaicrt.Qpc(self._qpc_path).bindings
        self.model_input_shape_dict = _shapes(b for b in bindings if b.is_input)
        self.model_output_shape_dict = _shapes(b for b in bindings if not b.is_input)

    def setup(self) -> None:
        """Load the program and activate it, where that was not done yet."""
        self._hosted()

    def _hosted(self) -> HostedProgram:
        with self._lock:
            if self._host is None:
                options = self._options
                self._host = HostedProgram(
                    self._qpc_path,
                    Hosting(
                        qids=(options.dev_id,),
                        num_activations=options.num_activations,
                        set_size=options.set_size,
                        group=options.oversubscription_name,
                    ),
                )
            return self._host

    def run(self, input_dict: Mapping[str, Any]) -> Dict[str, np.ndarray]:
        """One inference; may be called from several threads.

        Args:
            input_dict: arrays by input name, of the shapes and types of `model_input_shape_dict`. A
                retained state may be left out: it stays as it is on the device.

        Returns:
            Arrays by output name. Where retained states were left out, theirs stay on the device.

        Raises:
            ValueError: for a wrong name, shape or type.
            RuntimeError: where the device fails.
        """
        host = self._hosted()
        if self._options.enable_profiling:
            return self._profiles.run(lambda: self._run(host, input_dict))
        return self._run(host, input_dict)

    def _run(self, host: HostedProgram, input_dict: Mapping[str, Any]) -> Dict[str, np.ndarray]:
        begun = time.perf_counter()
        inputs = host.checked(input_dict)
        outputs = host.begin(inputs, _wanted(host, inputs)).finish()
        if self._options.enable_metrics or self._options.enable_profiling:
            self._latencies.add(time.perf_counter() - begun)
        return outputs

    def run_benchmark(
        self,
        num_inferences: Optional[int] = None,
        inf_time: Optional[int] = None,
        input_dict: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[int, float, int, int]:
        """Run the same inputs again and again, with every instance busy.

        Args:
            num_inferences: how many, 40 by default.
            inf_time: seconds for which inferences are begun, in place of a number of them.
            input_dict: as for `run`; random values by default.

        Returns:
            Inferences that ended, inputs a second (inferences times batch size), microseconds that
            they took, and the batch size.

        Raises:
            ValueError: for both of the first two, or one that is no positive number.
        """
        if num_inferences is not None and inf_time is not None:
            raise ValueError("num_inferences and inf_time cannot be used together")
        host = self._hosted()
        inputs = host.checked(_random(host) if input_dict is None else input_dict)
        wanted = _wanted(host, inputs)
        if inf_time is not None:
            most, seconds = float("inf"), float(_positive("inf_time", inf_time))
        else:
            asked = DEFAULT_NUM_INFERENCES if num_inferences is None else num_inferences
            most, seconds = float(_positive("num_inferences", asked)), float("inf")

        def finish(_: int, flight: Flight) -> None:
            flight.finish()

        count, taken = stream(
            host,
            lambda _: host.begin(inputs, wanted),
            goes_on=lambda done, passed: done < most and passed < seconds,
            finished=finish,
        )
        batch_size = host.qpc.getInfo().batchSize
        return count, count * batch_size / taken, round(taken * 1e6), batch_size

    def reset(self) -> None:
        """Release the device; a later `run` loads the program again."""
        with self._lock:
            host, self._host = self._host, None
        if host is not None:
            host.close()

    def backend_options(self) -> Dict[str, Any]:
        """The options that `update_backend_options` changes, with their values."""
        found = self._options._asdict()
        del found["compile_flags"]
        return dict(found)

    def update_backend_options(self, **options: Any) -> None:
        """Change some of `backend_options()`; the device is released until it is needed again."""
        with self._lock:
            self._options = updated(self._options, options)
        self.reset()

    def get_metrics(self) -> Dict[str, Any]:
        """Number and latencies (seconds) of the inferences that `run` has done.

        Raises:
            RuntimeError: unless `enable_metrics` or `enable_profiling` is set, or before a run.
        """
        self._must_measure()
        return self._latencies.metrics()

    def print_metrics(self) -> None:
        """Print the metrics in sentences."""
        self._must_measure()
        print("\n".join(self._latencies.lines()))

    def print_profile_data(self, n: int = 1) -> None:
        """Print which functions the first `n` inferences called, and how long those took."""
        if not self._options.enable_profiling:
            raise RuntimeError("Set enable_profiling=True to profile a session")
        print("\n".join(self._profiles.lines(n)))

    def _must_measure(self) -> None:
        if not (self._options.enable_metrics or self._options.enable_profiling):
            raise RuntimeError("Set enable_metrics=True or enable_profiling=True for metrics")


def _qpc_of(path: Path, options: SessionOptions) -> str:
    if path.is_dir():
        path /= FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"Failed to open file {path}: there is no model")
    if path.suffix != ".onnx":
        return str(path)
    return str(compiled(path, options.compile_flags, options.output_dir))


def _shapes(bindings: Iterable[Binding]) -> ShapeDict:
    return ShapeDict((b.name, (b.dims, b.dtype)) for b in bindings)


def _wanted(host: HostedProgram, inputs: Mapping[str, Any]) -> Optional[List[str]]:
    """The outputs to fetch: all, but no state where one was left on the device."""
    if len(inputs) == len(host.inputs):
        return None
    return [b.name for b in host.outputs if b.name not in host.states]


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive number, not {value!r:.80}")
    return number


def _random(host: HostedProgram) -> Dict[str, np.ndarray]:
    generator = np.random.default_rng(_SEED)
    shapes = host.specializations()[0]
    return {b.name: bounded_random(b, shapes[b.name], generator) for b in host.inputs}


def bounded_random(
    binding: Binding, dims: Tuple[int, ...], generator: np.random.Generator
) -> np.ndarray:
    """Values that every model takes: floats in [0, 1), integers 0 or 1, as any table has them."""
    if binding.dtype.kind == "f":
        return generator.random(dims, np.float32).astype(binding.dtype)
    return generator.integers(0, 2, dims).astype(binding.dtype)
