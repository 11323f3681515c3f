"""A checkpoint of a billion parameters passes through memory that could not hold it."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from qaic_ray.model.checkpoint import read_manifest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "export.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.disk_usage(tempfile.gettempdir()).free < 12e9, reason="needs 12 GB of free disk"
    ),
]


@pytest.fixture
def benchmark_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_billion_parameters_stream_through(benchmark_module: ModuleType, tmp_path: Path) -> None:
    shape = benchmark_module.SHAPE_7B | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
    }
    num_bytes = benchmark_module.write_checkpoint(tmp_path / "random-1b", shape)
    output = tmp_path / "random-1b-kv"
    _, _, tree_mb = benchmark_module.measure(
        benchmark_module.EXPORT, str(tmp_path / "random-1b"), str(output), '{"dtype": "float16"}'
    )
    assert num_bytes > 2e9
    assert tree_mb * 1e6 < num_bytes / 2
    manifest = read_manifest(output)
    assert manifest.num_layers == 16
    data = Path(f"{output / manifest.onnx_file}.data")
    assert data.stat().st_size >= num_bytes
    shutil.rmtree(tmp_path)
