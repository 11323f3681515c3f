"""A bundle of QEfficient's artifact-only mode: inputs alone, and outputs by name without files.

The form is that of quic/efficient-transformers, branch feature/compiler-artifact-only,
QEfficient/generation/runner_io.py: `io/` in the folder of the compile, and one inference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from compiled import PROMPT_LEN, write_inputs
from test_execution import step
from tiny_llama import NumpyLlama, TinyLlama

from qaic_ray.bundles.compare import compare_bundles, read_bundle
from qaic_ray.cli import main
from qaic_ray.emulator import compiler, runner
from qaic_ray.emulator.card import Machine
from qaic_ray.errors import UsageError

TOKENS = [3, 1, 4, 1]


def write_bundle(folder: Path, llama: TinyLlama) -> Path:
    """`io/` of the first chunk of a prompt, in slot 1."""
    io = folder / "io"
    (io / "data").mkdir(parents=True)
    entries = []
    for name, array in step(llama, {1: (TOKENS, 0)}, PROMPT_LEN).items():
        assert array.dtype == np.int64
        array.tofile(io / "data" / f"{name}.raw")
        entries.append(
            {
                "path": f"data/{name}.raw",
                "io-direction": "in",
                "elem-size": 8,
                "map-to": name,
                "dims": list(array.shape),
            }
        )
    output = {"io-direction": "out", "elem-size": 4, "map-to": "logits"}
    entries.append({"path": "data/logits.raw", **output, "dims": [1, 1, llama.vocab]})
    (io / "aic_batch_io.json").write_text(json.dumps({"IO-files": [entries]}, indent=2))
    return io


def replayed(qpc: Path, io: Path, target: Path) -> Path:
    argv = ["-t", str(qpc), "--aic-batch-json-input", str(io / "aic_batch_io.json")]
    assert runner.main([*argv, "--write-output-dir", str(target)]) == 0
    return target


def test_it_is_replayed_and_what_comes_is_compared(
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    llama = TinyLlama()
    assert compiler.main(write_inputs(tmp_path, llama)) == 0
    assert compiler.main([*write_inputs(tmp_path / "half", llama), "-convert-to-fp16"]) == 0
    io = write_bundle(tmp_path, llama)
    monkeypatch.chdir(tmp_path / "half")  # paths are those of the bundle, from anywhere
    first = replayed(tmp_path / "qpc", io, tmp_path / "first")
    truth = NumpyLlama(llama, llama.weights)
    for place, token in enumerate(TOKENS):
        expected = truth.forward(1, token, place)
    made = np.fromfile(first / "logits-activation-0-inf-0.bin", np.float32)
    np.testing.assert_allclose(made, expected, atol=1e-5)

    second = replayed(tmp_path / "half" / "qpc", io, tmp_path / "second")
    found = compare_bundles(read_bundle(first), read_bundle(second), tolerance=0.05)
    assert found.difference is None
    assert 0 < found.largest < 0.05

    for pair in ([io, first], [first, io], [io, io]):
        with pytest.raises(UsageError, match="replay it with qaic-runner, and compare what"):
            compare_bundles(*map(read_bundle, pair))
    monkeypatch.setattr(sys, "argv", ["qaic-ray", "compare", str(io), str(first)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "logits.raw is not there" in capsys.readouterr().err


def test_what_was_written_beside_a_run_is_compared_too(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `write_io_files` of QEfficient leaves it: outputs have files, and dims may be missing."""
    llama = TinyLlama()
    assert compiler.main(write_inputs(tmp_path, llama)) == 0
    io = write_bundle(tmp_path, llama)
    first = replayed(tmp_path / "qpc", io, tmp_path / "first")
    (first / "logits-activation-0-inf-0.bin").rename(io / "data" / "logits.raw")
    document = json.loads((io / "aic_batch_io.json").read_text())
    for entry in document["IO-files"][0]:
        del entry["dims"]
    (io / "aic_batch_io.json").write_text(json.dumps(document))
    again = compare_bundles(
        read_bundle(io), read_bundle(replayed(tmp_path / "qpc", io, tmp_path / "again"))
    )
    assert (again.executions, again.largest, again.difference) == (1, 0.0, None)
