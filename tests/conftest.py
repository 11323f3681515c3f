"""Fixtures of every folder: a tiny Llama, compiled by the emulated SDK in any shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs


# No test may mean the machine's speed.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyQpcs:
    """QPCs of one tiny Llama, made as they are asked for, and what transformers answers."""
    # Imported here: most tests need no torch.
    from tiny_qpcs import TinyQpcs

    return TinyQpcs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder that `qaic-ray compile` takes for an exported model."""
    from qaic_ray.contract import IoContract
    from qaic_ray.model.manifest import CUSTOM_IO_FILE, FORMAT, MANIFEST_FILE, ModelManifest

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
