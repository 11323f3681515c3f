"""A session's first executions as a bundle, replayed by `qaic-runner` to the last bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from qaic_ray import contract
from qaic_ray.bundles.compare import compare_bundles, read_bundle
from qaic_ray.bundles.record import Recording
from qaic_ray.emulator import folder, runner
from qaic_ray.engine.session import Session
from qaic_ray.errors import UsageError

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs


def run(session: Session, tokens: list[int], start: int) -> np.ndarray:
    """One row's tokens from a position on, and padding behind them and in the other rows."""
    shapes = session.specializations
    shape = shapes.decode if len(tokens) == 1 else shapes.prefills[0]
    ids = np.zeros((shape.batch_size, shape.seq_len), np.int64)
    positions = np.full_like(ids, contract.PADDING_POSITION)
    ids[0, : len(tokens)] = tokens
    positions[0, : len(tokens)] = np.arange(start, start + len(tokens))
    inputs = {contract.INPUT_IDS: ids, contract.POSITION_IDS: positions}
    if shapes.continuous:
        inputs[contract.BATCH_INDEX] = np.arange(shape.batch_size)[:, None]
    given = {name: a.astype(session.input_dtype(name)) for name, a in inputs.items()}
    return np.array(session.run(shape, given))


def test_its_executions_replay(
    tiny: TinyQpcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qpc = tiny.qpc(batch_size=2)
    session = Session(tiny.sdk, qpc, [1])
    session.record(Recording(str(tmp_path / "bundles"), 3))
    made = [run(session, [5, 6, 7], 0), *(run(session, [9], 3 + n) for n in range(3))]
    session.close()
    bundle = tmp_path / "bundles" / "card-1"
    first = read_bundle(bundle)
    assert len(first.executions) == 3
    raw = np.fromfile(bundle / "data" / "000000-out-logits.raw", np.float32)
    assert np.array_equal(raw, made[0].ravel())
    monkeypatch.setenv(folder.ROOT_VARIABLE, str(tiny.sdk.root))
    again = tmp_path / "again"
    again.mkdir()
    argv = ["-t", str(qpc), "--aic-batch-json-input", str(bundle / "aic_batch_io.json")]
    argv += ["--write-output-dir", str(again), "--write-output-num-samples", "3"]
    assert runner.main(argv) == 0
    found = compare_bundles(first, read_bundle(again))
    assert (found.executions, found.difference) == (3, None)


def test_a_full_disk_ends_the_recording_and_not_the_run(
    tiny: TinyQpcs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = Session(tiny.sdk, tiny.qpc(batch_size=2), [1])
    session.record(Recording(str(tmp_path / "bundles"), 9))
    bundle = tmp_path / "bundles" / "card-1"
    run(session, [5], 0)
    (bundle / "data" / "000001-in-input_ids.raw").mkdir()
    with caplog.at_level(logging.WARNING):
        run(session, [6], 1)
        run(session, [7], 2)
    session.close()
    assert caplog.text.count("no more is") == 1
    assert len(read_bundle(bundle).executions) == 1


def test_a_folder_that_cannot_be_made_is_said(tiny: TinyQpcs, tmp_path: Path) -> None:
    session = Session(tiny.sdk, tiny.qpc(batch_size=2), [1])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Cannot write"):
        session.record(Recording(str(tmp_path / "file" / "x"), 1))
    session.close()
