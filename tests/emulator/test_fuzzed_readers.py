"""Readers of the emulated SDK's front door: files and command lines as nobody would write them.

Each begins with what is right and changes a part of it, so that most get past the first check. The
containers have a file of their own, and so have weights in a checkpoint's files.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from fuzzing import changed_bytes, changed_words, counts, put_through
from google.protobuf.message import DecodeError
from mutations import documents, texts
from onnx import TensorProto, helper, numpy_helper
from small_nets import compile_net, two_inputs

from qaic_ray.emulator.card import Machine
from qaic_ray.emulator.compiler import argv as compiler_argv
from qaic_ray.emulator.compiler import calibration, configs
from qaic_ray.emulator.compiler.weights import ConstantError, open_initializer
from qaic_ray.emulator.qaic import raw_stats
from qaic_ray.emulator.qaic.hosting import HostedProgram, Hosting
from qaic_ray.emulator.qaic.options import read_options
from qaic_ray.emulator.runner import argv as runner_argv
from qaic_ray.emulator.runner.argv import HelpAsked, RunnerError, RunnerOptions
from qaic_ray.emulator.runner.batches import open_source


class Reader(NamedTuple):
    """The inputs of a seed and number, what reads one, and what it may raise."""

    inputs: Callable[[int, int], Iterator[Any]]
    read: Callable[[Path, Any], object]
    refusals: tuple[type[Exception], ...]
    share: int = 1
    """One in so many inputs of the others: YAML that is nested deep takes long."""


def of_json(good: Any) -> Callable[[int, int], Iterator[bytes]]:
    """Half of them by the structure, half by the bytes."""

    def make(seed: int, number: int) -> Iterator[bytes]:
        for document in documents(good, seed, number // 2):
            yield json.dumps(document).encode()
        yield from texts(json.dumps(good), seed, number - number // 2)

    return make


def of_text(good: str) -> Callable[[int, int], Iterator[bytes]]:
    return lambda seed, number: texts(good, seed, number)


def from_file(read: Callable[[str], object]) -> Callable[[Path, Any], object]:
    def written(folder: Path, data: bytes) -> object:
        path = folder / "file"
        path.write_bytes(data)
        return read(str(path))

    return written


SESSION = {
    **{"convert_to_fp16": True, "aic-num-cores": 4, "num_activations": 2, "set_size": 3},
    **{"onnx_define_symbol": [["batch", 1], ["seq", 8]], "mos": [1, 2], "ols": 1, "dev_id": 0},
    **{"output_dir": "made", "enable_metrics": True, "compile_threads": None, "backend": "aic"},
}
PROFILE = {
    "NodeProfiles": [
        {"NodeOutputName": "x", "Min": -1.5, "Max": 2.0, "Histogram": [1, 0, 3, 200] * 40},
        {"NodeOutputName": "y", "Min": 0.0, "Max": 0.0, "Histogram": [7] * 160},
    ]
}
PRECISIONS = {"FP16NodeInstanceNames": ["/conv", 3], "FP32NodeInstanceNames": ["softmax"]}
SHAPES = [
    {"batch_size": "1", "seq_len": "32", "ctx_len": "128"},
    {"batch_size": "1", "seq_len": "1", "ctx_len": "128"},
]
NAMED = [{"name": f"S{i}", "symbols": entry} for i, entry in enumerate(SHAPES)]
CUSTOM_IO = " - IOName: past_key.0\n   Precision: float16\n\n - IOName: 'x'\n   Precision: mxint8\n"
MDP = {
    "connections": [{"devices": [0, 1], "type": "p2p"}],
    "partitions": [{"name": "P", "devices": [{"deviceId": i, "numCores": 14} for i in (0, 1)]}],
}
EVENTS = [{"name": name, "ph": "X", "ts": 1.5, "dur": 20.0} for name in ("Execute", "Copy", "Copy")]
STATS = raw_stats.serialize(raw_stats.RawStats("net", 3, EVENTS))
RUNNER = ["-t", "qpc", "-a", "2", "--set-size=4", "-n", "20", "-D", "0:1", "--write-output-dir=o"]
COMPILER = [
    *("-m=net.onnx", "-aic-hw", "-aic-hw-version=2.0", "-aic-binary-dir=qpc", "-aic-num-cores=14"),
    *("-onnx-define-symbol=batch,1", "-mos=1,2", "-convert-to-fp16", "-output-node-name=a,b"),
]


def options_of_a_session(path: str) -> object:
    """Read, and handed on to the compiler's reader of flags, as a session does."""
    return compiler_argv.parse(read_options(path, {}).compile_flags)


def profile(path: str) -> object:
    """Read, and every range cut by every method, as a compile does."""
    return [
        calibration.bounds_of(seen, method, 99.0)
        for seen in calibration.read_profile(path).values()
        for method in calibration.METHODS
    ]


def shapes(path: str) -> object:
    return configs.read_specializations(path, named=True)


def list_of_inputs(folder: Path, data: bytes) -> object:
    """The compiler's list, and the files that it names."""
    np.zeros((1, 4), np.float32).tofile(folder / "a.raw")
    names = [str(folder / "a.raw").encode()] * 2
    (folder / "list.txt").write_bytes(data.replace(b"A", names[0]).replace(b"B", names[1]))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    dims = {"x": (1, 4), "y": (1, 4)}
    return list(calibration.samples(str(folder / "list.txt"), None, values, dims)())


def initializers(seed: int, number: int) -> Iterator[bytes]:
    """One with its values inside, one in a file."""
    inside = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w")
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3])
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "a.raw"), ("offset", "8"), ("length", "24")):
        outside.external_data.add(key=key, value=value)
    yield from changed_bytes(inside.SerializeToString(), seed, number // 2)
    yield from changed_bytes(outside.SerializeToString(), seed, number - number // 2)


def initializer(folder: Path, data: bytes) -> object:
    (folder / "a.raw").write_bytes(bytes(32))
    return open_initializer(TensorProto.FromString(data), str(folder)).tobytes()


def raw_statistics(_: Path, data: bytes) -> object:
    stats = raw_stats.parse(data, "file")
    return raw_stats.summary(stats.network, stats.events), raw_stats.trace(stats.events)


def statistics(seed: int, number: int) -> Iterator[bytes]:
    """Any of its bytes changed, or those behind the mark alone."""
    yield from changed_bytes(STATS, seed, number // 4)
    behind = json.loads(STATS[len(raw_stats.MAGIC) :])
    for data in of_json(behind)(seed, number - number // 4):
        yield raw_stats.MAGIC + data


def runner_options(line: list[str]) -> None:
    with contextlib.suppress(HelpAsked):  # it has no words
        runner_argv.parse(line)


def words(
    good: list[str], known: Any, parse: Callable[[list[str]], object]
) -> tuple[Callable[[int, int], Iterator[Any]], Callable[[Path, Any], object]]:
    others = [f"{name}{text}" for name in known for text in ("", "=1", "=x", "=a,b", "=-1=2")]

    def make(seed: int, number: int) -> Iterator[list[str]]:
        return changed_words(good, others, seed, number)

    return make, lambda _, line: parse(line)


REFUSED = (configs.ConfigError,)
READERS: dict[str, Reader] = {
    "options of qaic.Session": Reader(
        of_json(SESSION), from_file(options_of_a_session), (ValueError, compiler_argv.ArgvError), 5
    ),
    "quantization profile": Reader(of_json(PROFILE), from_file(profile), REFUSED, 5),
    "node precisions": Reader(
        of_json(PRECISIONS), from_file(configs.read_node_precisions), REFUSED, 5
    ),
    "list of the compiler's inputs": Reader(of_text("A,B\n\nB,A\nA,A\n"), list_of_inputs, REFUSED),
    "specializations": Reader(of_json({"specializations": NAMED}), from_file(shapes), REFUSED),
    "custom IO": Reader(of_text(CUSTOM_IO), from_file(configs.read_custom_io), REFUSED),
    "MDP": Reader(of_json(MDP), from_file(configs.read_partition), REFUSED),
    "initializer": Reader(initializers, initializer, (ConstantError, DecodeError)),
    "raw statistics": Reader(statistics, raw_statistics, (raw_stats.RawStatsError,)),
    "command line of qaic-runner": Reader(
        *words(RUNNER, [f"--{name}" for name in runner_argv.OPTIONS], runner_options),
        (RunnerError,),
    ),
    "command line of the compiler": Reader(
        *words(COMPILER, compiler_argv.FLAGS, compiler_argv.parse), (compiler_argv.ArgvError,)
    ),
}


@pytest.mark.parametrize("number", counts())
@pytest.mark.parametrize("name", READERS)
def test_odd_files_and_lines_are_read_or_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    monkeypatch.chdir(tmp_path)  # a command line may name folders, which are made
    reader = READERS[name]
    number //= reader.share
    found = put_through(
        name,
        reader.inputs(number, number),
        lambda data: reader.read(tmp_path, data),
        reader.refusals,
    )
    assert sum(found) == number
    assert 0 < found.read < number


FILES = ("features", "words")
BATCH = {
    "IO-files": [
        [
            {"path": "f.raw", "io-direction": "in", "elem-size": 4, "map-to": "features"},
            {"path": "w.raw", "io-direction": "in", "elem-size": 8, "map-to": "words"},
            {"path": "s.raw", "io-direction": "out", "elem-size": 4, "map-to": "scores"},
        ],
        [
            {"path": "f.raw", "io-direction": "in", "map-to": "features", "dims": [2, 4]},
            {"path": "w.raw", "io-direction": "in", "map-to": "words", "dims": [2, 5]},
        ],
    ]
}
"""Of `two_inputs` in two rows of four features and five words."""


@pytest.fixture
def opened(machine: Machine, tmp_path: Path) -> Iterator[HostedProgram]:
    net = compile_net(tmp_path / "net", two_inputs())
    for name, bytes_ in (("f", 2 * 4 * 4), ("w", 2 * 5 * 8), ("s", 2 * 3 * 4)):
        (tmp_path / f"{name}.raw").write_bytes(bytes(bytes_))
    with contextlib.closing(HostedProgram(str(net), Hosting(set_size=1))) as host:
        yield host


@pytest.mark.parametrize("number", counts())
@pytest.mark.parametrize("kind", ["batch_json", "batch_file_list"])
def test_odd_batches_of_the_runner_are_read_or_refused_in_a_line(
    opened: HostedProgram,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    number: int,
) -> None:
    """Every batch of them is read too, with the files that it names."""
    path = tmp_path / "batches"
    monkeypatch.chdir(tmp_path)
    lines = f"{' ' * 20}f.raw{' ' * 20},{' ' * 20}w.raw{' ' * 20}\n\n" * 2
    make = of_json(BATCH) if kind == "batch_json" else of_text(lines)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        asked: dict[str, Any] = {kind: str(path)}
        source = open_source(opened, RunnerOptions(qpc="q", compares=True, **asked))
        for index in range(source.count):
            source.batch(index)

    found = put_through(f"qaic-runner, {kind}", make(number, number), read, (RunnerError,))
    assert sum(found) == number
    assert 0 < found.read < number
