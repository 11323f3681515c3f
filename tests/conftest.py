"""What every test has: one profile of hypothesis, a cache of its own, a process of its kind."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from qaic_ray.folders import CACHE_VARIABLE, cache_folder

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

# No test may mean the machine's speed, and what CI says of a commit is what everybody sees.
settings.register_profile(
    "fast",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=list(HealthCheck),
)
# Other examples each time, and more of them.
settings.register_profile(
    "slow", settings.get_profile("fast"), derandomize=False, max_examples=200, print_blob=True
)
settings.load_profile("fast")

GROUPS = ("ray", "tiny", "model")
"""Of tests that share what is dear, begun before all others: a Ray, the QPCs of `tiny`, SmolLM2."""


def pytest_configure(config: pytest.Config) -> None:
    """Have each process of tests use cards, locks and a cache that nobody else uses.

    Where it cannot be passed on it is in the environment: tests start processes of their own.
    """
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    cache = Path(tempfile.mkdtemp(prefix="qaic-ray-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    (cache / "models").symlink_to(models.absolute())
    os.environ[CACHE_VARIABLE] = str(cache)
    # Tiny models are slower on several threads, and slower still beside another process of tests.
    os.environ["QAIC_EMULATOR_THREADS"] = "1"
    # As in a terminal: what a shell started with `&` ignores SIGINT, and so would its children.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together, in one process, what shares something: a group of above, or a file."""
    group_of = {item: _group(item) for item in items}
    for item, group in group_of.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: [*GROUPS, group_of[item]].index(group_of[item]))


def _group(item: pytest.Item) -> str:
    if item.get_closest_marker("cluster"):
        return "ray"
    if item.get_closest_marker("model"):
        return "model"
    return "tiny" if "tiny" in getattr(item, "fixturenames", ()) else item.path.stem


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
