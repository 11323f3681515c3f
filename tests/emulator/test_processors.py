"""The step on other processors, without its compiler, and with any cache of machine code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import write_inputs
from step_programs import SLOTS, TinyPrograms, largest_error
from tiny_llama import TinyLlama

from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram
from qaic_ray.emulator.container.steps import KERNELS_VARIABLE
from qaic_ray.emulator.kernels import machine, native

HASWELL = "haswell,+avx2,+fma,+f16c"
OLD = "x86-64,+sse2"
NUMERICS = ("exact", "fast")
KERNEL_TESTS = Path(__file__).with_name("test_kernels.py")

# For any Python that has the emulator in some place: a prompt of three rows, then a decode step.
SCORE = """
import importlib, logging, sys
import numpy as np
logging.basicConfig(format="%(message)s")
package, out, *paths = sys.argv[1:]
execution = importlib.import_module(package + ".container.execution")
made = {}
for number, path in enumerate(paths):
    qpc = execution.CompiledProgram.open(path)
    vocab = next(b.dims[-1] for b in qpc.bindings if b.name == "logits")
    for numerics in ("exact", "fast"):
        loaded = execution.LoadedProgram(qpc, 2, numerics=numerics)
        activation = loaded.activate()
        ids = np.random.default_rng(0).integers(0, 300, (3, 64))
        for name, positions in (
            ("prompt", np.where(np.arange(64) < [[40], [1], [17]], np.arange(64), -1)),
            ("decode", np.array([[40], [1], [17]])),
        ):
            inputs = {"input_ids": ids[:, : positions.shape[1]], "position_ids": positions}
            logits = activation.run(inputs, {"logits": (*positions.shape, vocab)})["logits"]
            made[f"{number} {numerics} {name}"] = logits[positions >= 0]
        made[f"{number} {numerics} step"] = loaded.step is not None
np.savez(out, **made)
"""

# Nothing may be imported but Python's own, these four, and what they need themselves.
ALONE = """
import sys
ALLOWED = set(sys.stdlib_module_names) | {
    "numpy", "onnx", "onnxruntime", "google", "ml_dtypes", "typing_extensions", "flatbuffers",
    "packaging", "coloredlogs", "humanfriendly", "sympy", "mpmath", "qaic_emulated_sdk", "_pytest",
}
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Gate())
sys.path.insert(0, sys.argv.pop(1))
"""

COMPILE = """
from qaic_emulated_sdk import compiler
sys.exit(compiler.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, sdk: Path) -> TinyPrograms:
    return TinyPrograms(tmp_path_factory.mktemp("processors"), sdk)


@pytest.fixture(scope="module")
def paths(programs: TinyPrograms) -> list[str]:
    """QPCs that reach MXFP6 and float16 kernels, vectors and plain loops."""
    cases = [
        ("head_dim 64, biases", "mx6, float32 caches"),
        ("plain loops", "mx6"),
        ("Granite", "fp16"),
    ]
    made = [programs.make(m, p, continuous_batching=False) for m, p in cases]
    return [os.path.dirname(program.qpc.path) for program in made]


def started(
    code: str, *arguments: str, cpu: str | None = None, **variables: str
) -> subprocess.Popen[str]:
    environment = os.environ | variables | ({machine.CPU_VARIABLE: cpu} if cpu else {})
    command = [sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    """What it printed; it has to succeed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out + err


def scored(path: Path) -> dict[str, Any]:
    with np.load(path) as made:
        return dict(made)


def scored_here(paths: list[str], **options: Any) -> dict[str, Any]:
    """What `SCORE` does, in this process."""
    made: dict[str, Any] = {}
    for number, path in enumerate(paths):
        qpc = CompiledProgram.open(path)
        vocab = next(b.dims[-1] for b in qpc.bindings if b.name == "logits")
        ids = np.random.default_rng(0).integers(0, 300, (SLOTS, 64))
        lengths = np.array([[40], [1], [17]])
        for numerics in NUMERICS:
            activation = LoadedProgram(qpc, 2, numerics=numerics, **options).activate()
            prompts = np.where(np.arange(64) < lengths, np.arange(64), -1)
            for name, positions in (("prompt", prompts), ("decode", lengths)):
                inputs = {"input_ids": ids[:, : positions.shape[1]], "position_ids": positions}
                wanted = {"logits": (*positions.shape, vocab)}
                logits = activation.run(inputs, wanted)["logits"]
                made[f"{number} {numerics} {name}"] = logits[positions >= 0]
    return made


needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="haswell is a processor of x86-64"
)


@needs_x86
def test_a_processor_without_avx512_computes_the_same(paths: list[str], tmp_path: Path) -> None:
    """Two processes at once, with one empty cache: one of them compiles, both are right."""
    cache = tmp_path / "cache"
    outs = [tmp_path / f"{i}.npz" for i in range(2)]
    running = [
        started(
            SCORE,
            "qaic_ray.emulator",
            str(out),
            *paths,
            cpu=HASWELL,
            QAIC_EMULATOR_CACHE=str(cache),
        )
        for out in outs
    ]
    assert [ended(process) for process in running] == ["", ""]
    one, other = (scored(out) for out in outs)
    reference, here = scored_here(paths, use_lowered=False), scored_here(paths)
    for key, made in one.items():
        np.testing.assert_array_equal(made, other[key])
        if key.endswith("step"):
            assert made
            continue
        is_exact = "exact" in key
        # float16 caches: see `test_step.py`.
        tolerance = 1e-4 if key.startswith("0") else 2e-3
        error = largest_error([made], [(reference if is_exact else here)[key]])
        assert error <= tolerance, key
    assert len(list(cache.glob("emulator/step-*.o"))) == 1
    assert {p.suffix for p in cache.glob("emulator/*")} <= {".o", ".json", ""}
    assert not list(cache.glob("emulator/tmp*"))
    kernels = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(KERNEL_TESTS),
    ]
    done = subprocess.run(
        kernels,
        env=os.environ | {machine.CPU_VARIABLE: HASWELL, "QAIC_EMULATOR_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@needs_x86
def test_a_processor_without_kernels_is_told_of_once(paths: list[str], tmp_path: Path) -> None:
    out = tmp_path / "made.npz"
    said = ended(started(SCORE, "qaic_ray.emulator", str(out), *paths, cpu=OLD))
    assert said.count("no compiled kernels here") == 1
    assert len(said.splitlines()) == 1
    expected = scored_here(paths, use_step=False)
    for key, made in scored(out).items():
        if key.endswith("step"):
            assert not made
        else:
            np.testing.assert_array_equal(made, expected[key])


def test_the_folder_works_with_four_packages_alone(
    sdk: Path, paths: list[str], tmp_path: Path
) -> None:
    place = str(sdk / "dev" / "lib" / platform.machine())
    argv = write_inputs(tmp_path / "tiny", TinyLlama())
    said = ended(started(ALONE + COMPILE, place, *argv))
    assert "Generated binary" in said
    out = tmp_path / "made.npz"
    said = ended(started(ALONE + SCORE, place, "qaic_emulated_sdk", str(out), *paths))
    assert said.count("no compiled kernels here") == 1
    assert "llvmlite is missing" in said
    expected = scored_here(paths, use_step=False)
    for key, made in scored(out).items():
        if not key.endswith("step"):
            np.testing.assert_array_equal(made, expected[key])


def test_onnxruntime_computes_where_it_is_asked_to(
    paths: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "onnxruntime")
    loaded = LoadedProgram(CompiledProgram.open(paths[0]), 1)
    assert loaded.step is None
    assert loaded.lowered is not None
    assert caplog.text == ""


@pytest.fixture
def data() -> bytes:
    """A file of machine code, of the cache that other tests have."""
    native.step_function()
    path = native._file()
    assert path is not None
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("QAIC_EMULATOR_CACHE", str(tmp_path / "cache"))
    folder = native.cache_folder()
    assert folder == tmp_path / "cache" / "emulator"
    return folder


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "shorter than a digest": lambda data: data[:10],
    "garbage": lambda data: bytes(len(data)),
    "a bit turned": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "without its head": lambda data: data[32:],
}


def test_machine_code_that_is_damaged_is_not_run(
    data: bytes, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = native._file()
    assert path is not None
    path.write_bytes(data)
    assert native._load() == data[32:]
    for name, damage in DAMAGES.items():
        path.write_bytes(damage(data))
        assert native._load() is None, name
        assert ("damaged" in caplog.text) == (name != "empty"), name
        caplog.clear()
    native.step_function.__wrapped__()  # as a new process does
    assert native._load() == path.read_bytes()[32:]
    assert [p.name for p in cache.glob("tmp*")] == []


def test_a_folder_that_others_may_write_to_is_not_used(cache: Path) -> None:
    assert cache.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o702):
        cache.chmod(mode)
        assert native.cache_folder() is None
    cache.chmod(0o755)
    assert native.cache_folder() == cache
    cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to(cache.with_name("elsewhere"))
    assert native.cache_folder() is None


def test_another_users_folder_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert native.cache_folder() is None


def test_a_cache_that_cannot_be_written_is_done_without(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "lock").mkdir()
    with native.one_at_a_time():
        pass
    native.keep(cache / "missing" / "file", b"code")
    assert "cannot be written" in caplog.text
    (cache / "taken").mkdir()
    native.keep(cache / "taken", b"code")
    assert list(cache.glob("tmp*")) == []
    cache.parent.joinpath("file").touch()
    monkeypatch.setenv("QAIC_EMULATOR_CACHE", str(cache.parent / "file"))
    assert native.cache_folder() is None
    with native.one_at_a_time():
        assert native._load() is None
