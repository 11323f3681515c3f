"""Nothing is found of what is known to be good: our exports and QPCs, shipped jobs, QEfficient's."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx.backend.test
import pytest
from made_artifacts import COMMAND, folder_of, mdp, model, program, qefficient, script, shapes
from made_artifacts import SHAPES, named, weight_free
from tiny_llama import TinyLlama
from tiny_qpcs import TinyQpcs

from qaic_ray.check.artifacts import read_artifacts
from qaic_ray.check.checks import findings
from qaic_ray.check.facts import ArtifactFinding, Target
from qaic_ray.contract import IoContract
from qaic_ray.limits import CARDS, version_of
from qaic_ray.option_types import prompt_lens
from qaic_ray.pipeline.compile_step import open_folder
from qaic_ray.pipeline.job import load_job
from qaic_ray.shipped.jobs import job_names, shipped_job
from qaic_ray.compile.compiler import grid_variants

NEW = version_of("1.22")
OF_THE_DL2Q = version_of("1.14.2")
STANDARD = CARDS["PCIe"]


def found(path: Path, apps: tuple[int, ...] = NEW) -> list[ArtifactFinding]:
    return findings(read_artifacts(path), Target(apps, STANDARD))


QPCS = {
    "continuous": {},
    "static": {"continuous": False},
    "cache-index": {"io": IoContract.CACHE_INDEX, "continuous": False},
    "several prompts": {"prompt_len": (4, 8, 16)},
    "prefill rows": {"prefill_rows": 2},
    "speculation": {"num_speculative_tokens": 3},
    "compute contexts": {"comp_ctx_lengths": (32,)},
    "all logits": {"logits": "all"},
    "next tokens": {"next_tokens": True},
    "decode only": {"prompt_len": 1},
}


@pytest.mark.parametrize("name", QPCS)
def test_exports_and_programs_of_ours(name: str, tiny: TinyQpcs) -> None:
    how = QPCS[name]
    folder = tiny.qpc(**how)
    apps = OF_THE_DL2Q if name == "cache-index" else NEW
    assert found(folder, apps) == []
    assert found(folder / "programqpc.bin", apps) == []
    for exported in tiny._exports.values():
        assert found(exported) == []


@pytest.mark.parametrize("name", job_names())
def test_shapes_of_shipped_jobs(name: str, tiny: TinyQpcs, tmp_path: Path) -> None:
    job = load_job(shipped_job(name))
    source = next(iter(tiny._exports.values()), None) or tiny.qpc()
    grid = job.compile
    for continuous in {job.export.continuous_batching}:
        variants = grid_variants(
            open_folder(_exported(tiny)).source, grid, continuous=continuous
        )
        for variant in variants:
            path = tmp_path / "specializations.json"
            path.write_text(variant.specializations.to_json(named=False))
            assert found(path, OF_THE_DL2Q) == []
            path.write_text(variant.specializations.to_json(named=True))
            assert found(path) == []
    assert source


def _exported(tiny: TinyQpcs) -> Path:
    if not tiny._exports:
        tiny.qpc()
    return next(iter(tiny._exports.values()))
