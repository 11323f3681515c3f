"""Fixtures of the unit tests: an exported model as far as files go, no weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qaic_ray.contract import IoContract
from qaic_ray.model.manifest import CUSTOM_IO_FILE, FORMAT, MANIFEST_FILE, ModelManifest


@pytest.fixture
def make_model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder that `qaic-ray compile` takes for an exported model."""

    def make(
        name: str = "m-kv", *, continuous: bool = False, max_position: int = 2048, **changes: Any
    ) -> Path:
        folder = tmp_path / name
        onnx_file = f"generatedModels/{name}_fp16_simplified.onnx"
        (folder / onnx_file).parent.mkdir(parents=True)
        (folder / onnx_file).touch()
        (folder / CUSTOM_IO_FILE).touch()
        manifest = ModelManifest(
            format=FORMAT,
            name=name,
            source="m",
            contract=IoContract.POSITION_IDS,
            continuous=continuous,
            architecture="LlamaForCausalLM",
            architecture_sha256="0" * 64,
            num_layers=1,
            hidden_size=8,
            intermediate_size=8,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            vocab_size=8,
            max_position=max_position,
            opset=17,
            dtype="float32",
            eos_ids=(2,),
            onnx_file=onnx_file,
            weights_sha256="0" * 64,
            num_clipped=0,
            tool_versions={},
            sources=(),
            **changes,
        )
        (folder / MANIFEST_FILE).write_text(manifest.to_json())
        return folder

    return make
