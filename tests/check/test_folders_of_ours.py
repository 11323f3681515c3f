"""Folders of ours that were changed since they were made; a cache of QEfficient that was moved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from made_artifacts import COMMAND, qefficient
from tiny_qpcs import MAX_POSITION, TinyQpcs

from qaic_ray.check.artifacts import read_artifacts
from qaic_ray.check.checks import findings
from qaic_ray.check.facts import Target
from qaic_ray.contract import Specializations
from qaic_ray.limits import CARDS

TARGET = Target((1, 22), CARDS["PCIe"])


def rules(path: Path) -> set[str]:
    return {one.rule for one in findings(read_artifacts(path), TARGET)}


@pytest.fixture
def program(tiny: TinyQpcs, tmp_path: Path) -> Path:
    """A copy of a QPC's folder."""
    return Path(shutil.copytree(tiny.qpc(), tmp_path / "qpc"))


@pytest.fixture
def exported(tiny: TinyQpcs, tmp_path: Path) -> Path:
    """A copy of an export's folder."""
    return Path(shutil.copytree(tiny.exported_for(tiny.qpc()), tmp_path / "tiny-kv"))


def test_copies_are_as_good(program: Path, exported: Path) -> None:
    assert rules(program) == rules(exported) == set()


def _cut_weights(folder: Path) -> None:
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])


def _change_custom_io(folder: Path) -> None:
    path = folder / "custom_io.yaml"
    path.write_text(path.read_text().replace("float16", "float"))


CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "weights are cut": (_cut_weights, {"export-changed", "weights-short"}),
    "another custom IO": (_change_custom_io, {"export-changed"}),
    "no manifest that can be read": (
        lambda folder: (folder / "manifest.json").write_text("{}"),
        {"export-changed"},
    ),
    "no graph": (
        lambda folder: next(folder.rglob("*.onnx")).unlink(),
        {"export-changed"},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_export_is_named(name: str, exported: Path) -> None:
    change, expected = CHANGES[name]
    change(exported)
    assert rules(exported) == expected


def test_shapes_beyond_the_model_are_named(exported: Path) -> None:
    shapes = Specializations.build(
        batch_size=2, prompt_len=8, ctx_len=2 * MAX_POSITION, continuous=True
    )
    (exported / "specializations.json").write_text(shapes.to_json(named=True))
    assert rules(exported) == {"context-beyond-model"}


def test_a_changed_program_is_named(program: Path) -> None:
    path = program / "programqpc.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert rules(program) == {"program-changed"}


def test_a_cache_that_was_moved_is_named(tmp_path: Path) -> None:
    words = (*(word for word in COMMAND if not word.startswith("-m=")), "-m=/gone/model.onnx")
    folder = qefficient(words)(tmp_path)
    compiled = next(folder.rglob("qpc-*"))
    assert rules(folder) == set()
    assert rules(compiled) == {"model-moved"}
