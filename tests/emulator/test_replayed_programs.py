"""Five programs, a hundred random executions each: replayed by qaic-runner, and one weight found.

`scripts/test tests/emulator/test_replayed_programs.py --log-cli-level INFO` says what was found.
What has to be is in `recorded_programs.py`: numpy and onnxruntime, which know nothing of bundles.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_programs import MOST, PROGRAMS, Change, Recorded
from test_recorded_executions import Caller, replay

from qaic_ray.bundles.compare import Bundle, Difference, compare_bundles, read_bundle
from qaic_ray.emulator.card import Machine
from qaic_ray.emulator.container import FILE_NAME, read_qpc
from qaic_ray.emulator.qaicrt.recording import VARIABLE

pytestmark = pytest.mark.slow

NOISE = 1e-6
"""Of a sum in float32 whose terms are near 1: what float64 says is more than that is seen."""


def recorded(one: Recorded, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Bundle]:
    """The QPC, and the bundle of its executions."""
    qpc = one.compile(folder / "made", one.model)
    monkeypatch.setenv(VARIABLE, f"{MOST}:{folder / 'bundles'}")
    caller = Caller(qpc)
    for execution in one.executions:
        caller.run(execution.given, execution.wanted)
    caller.close()
    monkeypatch.delenv(VARIABLE)
    (bundle,) = (folder / "bundles").iterdir()
    return qpc, read_bundle(bundle)


def constants(qpc: Path) -> bytes:
    return bytes(read_qpc(str(qpc / FILE_NAME))[1]["constants.bin"])


def check_named(found: Difference | None, one: Recorded, changed: Any) -> str:
    """It is where the independent computation says that the programs differ first; its text."""
    expected = one.truth(one.model, changed)
    assert expected is not None
    assert found is not None
    assert (found.execution, found.direction) == (expected.execution, "output")
    assert found.tensor == expected.tensor
    assert found.element is not None
    before = np.ravel_multi_index(found.element, expected.apart.shape)
    assert expected.apart[found.element] > 0
    assert expected.apart.ravel()[:before].max(initial=0) < NOISE
    return found.text


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hundred_executions_are_replayed_and_a_weight_is_found(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one = PROGRAMS[name](name)
    qpc, bundle = recorded(one, tmp_path, monkeypatch)
    again = compare_bundles(bundle, read_bundle(replay(qpc, bundle.folder, tmp_path / "again")))
    assert (again.executions, again.largest, again.difference) == (MOST, 0.0, None)
    said = [f"{name}: {MOST} executions are equal to the last bit"]
    for number, change in enumerate(one.changes):
        changed = change.by_one_step(one.model)
        other = one.compile(tmp_path / f"step-{number}", changed)
        assert constants(other) != constants(qpc)
        outputs = replay(other, bundle.folder, tmp_path / f"stepped-{number}")
        found = compare_bundles(bundle, read_bundle(outputs)).difference
        said.append(
            f"  {change.text}, the next {change.stored}: {check_named(found, one, changed)}"
        )
        found = with_an_ulp(one, change, qpc, bundle, tmp_path / f"ulp-{number}")
        what = found.text if found else "rounded away, and nothing differs"
        said.append(f"  {change.text}, the next float32 of the file: {what}")
    logging.getLogger(__name__).info("\n".join(said))


def with_an_ulp(
    one: Recorded, change: Change, qpc: Path, bundle: Bundle, folder: Path
) -> Difference | None:
    """What differs after an ulp of float32: nothing where weights are rounded to less."""
    other = one.compile(folder / "made", change.by_an_ulp_of_float32(one.model))
    is_kept = change.stored == "float32"
    assert (constants(other) != constants(qpc)) == is_kept
    outputs = replay(other, bundle.folder, folder / "again")
    found = compare_bundles(bundle, read_bundle(outputs)).difference
    assert (found is not None) == is_kept
    return found


def test_the_executions_are_random_and_the_same_each_time() -> None:
    first, second = (PROGRAMS["continuous batching"](n) for n in ("a", "a"))
    for one, other in zip(first.executions, second.executions, strict=True):
        assert all(np.array_equal(one.given[name], other.given[name]) for name in one.given)
    kinds = {len(one.given["input_ids"][0]) for one in first.executions}
    assert len(kinds) == 2  # prefills and decodes
