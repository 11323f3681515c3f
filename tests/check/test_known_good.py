"""Nothing is found of what is known to be good: exports and QPCs of ours, and QEfficient's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx.backend.test
import pytest
from made_artifacts import (
    COMMAND,
    SHAPES,
    folder_of,
    io_list,
    mdp,
    model,
    named,
    program,
    qefficient,
    script,
    shapes,
    weight_free,
)
from tiny_llama import TinyLlama
from tiny_qpcs import TinyQpcs

from qaic_ray.check.artifacts import read_artifacts
from qaic_ray.check.builds import check_builds
from qaic_ray.check.checks import findings
from qaic_ray.check.facts import ArtifactFinding, Target
from qaic_ray.compile.compiler import Source, Variant
from qaic_ray.compile.store import BuildRequest
from qaic_ray.contract import IoContract, Specializations
from qaic_ray.limits import CARDS, version_of
from qaic_ray.option_types import Precision
from qaic_ray.options import EmulatorOptions, ExportOptions
from qaic_ray.pipeline.compile_step import open_folder
from qaic_ray.pipeline.job import job_variants, load_job
from qaic_ray.sdk import find_sdk
from qaic_ray.shipped.jobs import shipped_jobs

SPECIALIZATIONS = Path(__file__).parents[2] / "configs" / "specializations"
NEW = version_of("1.22")
OF_THE_DL2Q = version_of("1.14.2")
STANDARD = CARDS["PCIe"]


def found(path: Path, apps: tuple[int, ...] = NEW) -> list[ArtifactFinding]:
    return findings(read_artifacts(path), Target(apps, STANDARD))


QPCS: dict[str, dict[str, Any]] = {
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
    exported = tiny.exported_for(folder)
    assert found(exported, apps) == []


def test_an_export_whose_weights_stay_where_they_are(tiny: TinyQpcs, tmp_path: Path) -> None:
    exported = tiny.exported(ExportOptions(weights="reference"))
    assert found(exported) == []
    graph = next(exported.rglob("*.onnx"))
    assert found(graph) == []
    shapes = Specializations.build(batch_size=2, prompt_len=8, ctx_len=64, continuous=True)
    reads_them = find_sdk("emulated", EmulatorOptions(apps_version="1.22"))
    for precision in Precision:
        variant = Variant(open_folder(exported).source, precision, 14, shapes)
        assert check_builds([BuildRequest(variant, reads_them, tmp_path)]) == []


@pytest.mark.parametrize("name", shipped_jobs())
def test_shapes_of_shipped_jobs(name: str, tmp_path: Path) -> None:
    variants = job_variants(load_job(Path(name)), Source("m-kv", Path(), None, ""))
    assert variants
    for variant in variants:
        path = tmp_path / "specializations.json"
        path.write_text(variant.specializations.to_json(named=False))
        assert found(path, OF_THE_DL2Q) == []
        path.write_text(variant.specializations.to_json(named=True))
        assert found(path) == []


@pytest.mark.parametrize("path", sorted(SPECIALIZATIONS.glob("*.json")), ids=lambda p: p.stem)
def test_shipped_specializations(path: Path) -> None:
    assert found(path, OF_THE_DL2Q) == []


LLAMAS = {
    "continuous": TinyLlama(),
    "static": TinyLlama(continuous=False),
    "compute contexts": TinyLlama(comp_ctx_lengths=True),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_a_cache_of_qefficient(name: str, tmp_path: Path) -> None:
    llama = LLAMAS[name]
    entries = [
        {"batch_size": str(rows), "seq_len": str(length), "ctx_len": "16"}
        | ({"full_batch_size": "3"} if llama.continuous else {})
        | ({"comp_ctx_lengths": str(reach)} if llama.comp_ctx_lengths else {})
        for rows, length, reach in ((1 if llama.continuous else 3, 4, 8), (3, 1, 16))
    ]
    names = ("Prefill", "Decode")
    said = [{"name": n, "symbols": e} for n, e in zip(names, entries, strict=True)]
    folder = qefficient(graph=llama.onnx(), entries=said)(tmp_path)
    for path in folder.rglob("custom_io.yaml"):
        states = [half for n in llama.past_names() for half in (n, f"{n}_RetainedState")]
        path.write_text(io_list(dict.fromkeys(states, "float16")))
    compiled = next(folder.rglob("qpc-*"))
    for path in (folder, compiled.parent, compiled, compiled / "qpc", *compiled.glob("*.*on")):
        if path.name != "qconfig.json":
            assert found(path) == []


GOOD = {
    "shapes": shapes(*SHAPES),
    "named shapes": shapes(*named(*SHAPES)),
    "an MDP file": mdp([(0, 14), (1, 14)]),
    "a graph": model(),
    "a folder": folder_of(),
    "QEfficient's": qefficient(),
    "an artifact-only bundle": script(*COMMAND),
    "a program": program,
    "a weight-free model": weight_free(),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_ones_of_the_situations(name: str, tmp_path: Path) -> None:
    assert found(GOOD[name](tmp_path)) == []


def test_models_of_others() -> None:
    data = Path(onnx.backend.test.__file__).parent / "data"
    graphs = sorted(data.glob("light/light_*.onnx"))
    graphs += sorted(data.glob("pytorch-converted/*/model.onnx"))
    assert len(graphs) > 40
    odd = {path.parent.name: found(path) for path in graphs}
    assert {name: each for name, each in odd.items() if each} == {}
