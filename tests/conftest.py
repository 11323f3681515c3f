"""What every test has: one profile of hypothesis, a cache of its own, a process of its kind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from qaic_ray.files.folders import CACHE_VARIABLE, cache_folder

if TYPE_CHECKING:
    from one_ray import OneRay
    from tiny_qpcs import TinyQpcs

    from qaic_ray.cluster.cluster import Cluster

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

_one_ray: OneRay | None = None

GROUPS = {
    "ray": ("tests/cluster/",),
    "road": ("tests/road/",),
    "tiny": (
        *("tests/engine/", "tests/worker/", "tests/emulator/test_lowered_"),
        "tests/check/test_known_good",
    ),
    "model": ("tests/smollm2/",),
    "pages": ("tests/pages/",),
}
"""Of tests that share what is dear, begun before all others: a Ray, an export and the Rays of
commands, the QPCs of `tiny`, SmolLM2."""

RAY_GROUPS = ("ray", "road")

MACHINE_CODE_VARIABLE = "QAIC_EMULATOR_CACHE"


def pytest_configure(config: pytest.Config) -> None:
    """Have each process of tests use cards, locks and a cache that nobody else uses.

    All share one thing, which depends on nothing that a test does: the machine code of emulated
    cards takes seconds to compile. Where it cannot be passed on it is in the environment: tests
    start processes of their own.
    """
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    cache = Path(tempfile.mkdtemp(prefix="qaic-ray-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    (cache / "models").symlink_to(models.absolute())
    os.environ[CACHE_VARIABLE] = str(cache)
    if not hasattr(config, "workerinput"):  # the first process, whose environment others inherit
        os.environ[MACHINE_CODE_VARIABLE] = str(cache)
    # Tiny models are slower on several threads, and slower still beside another process of tests.
    os.environ["QAIC_EMULATOR_THREADS"] = "1"
    # As in a terminal: what a shell started with `&` ignores SIGINT, and so would its children.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Read all tests without a search for garbage, and never search what they imported."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the groups, and have those of a Ray follow each other."""
    rays = {item.path: 0 for item in items}
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        rays[item.path] = max(rays[item.path], ("one_ray" in fixtures) + ("fleet" in fixtures))
    items.sort(key=lambda item: (_rank(item.nodeid), rays[item.path]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a group, else a file, in one process.

    `--dist loadgroup` cannot: it writes where pytest 9.2 does not look.
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return GroupScheduling(config, log)


def _group(nodeid: str) -> str:
    path = nodeid.partition("::")[0]
    return next((name for name, begins in GROUPS.items() if path.startswith(begins)), path)


def _rank(nodeid: str) -> int:
    return [*GROUPS, _group(nodeid)].index(_group(nodeid))


# Imported in the fixtures: most tests need neither Ray nor torch.
@pytest.fixture(scope="session")
def one_ray() -> Iterator[OneRay]:
    """Where tests have their Ray from; it ends, and so does what was set for it, with the last of
    the group."""
    from one_ray import OneRay

    global _one_ray
    _one_ray = OneRay()
    yield _one_ray
    _one_ray.close()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """End the shared Ray where nobody goes on with it."""
    if _one_ray and not (nextitem and _group(nextitem.nodeid) in RAY_GROUPS):
        _one_ray.close()


@pytest.fixture
def cluster(one_ray: OneRay) -> Cluster:
    """A Ray with four cards."""
    from one_ray import four_cards

    return one_ray.use("four cards", four_cards)


@pytest.fixture
def address(cluster: Cluster) -> str:
    """Of a Ray that is there already: a start a command would take most of a test's time."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyQpcs:
    """QPCs of one tiny Llama, made as they are asked for, and what transformers answers."""
    from tiny_qpcs import TinyQpcs

    return TinyQpcs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder that `qaic-ray compile` takes for an exported model."""
    from small_graphs import write_decoder

    from qaic_ray.contract import IoContract
    from qaic_ray.model.checkpoint import (
        CUSTOM_IO_FILE,
        MANIFEST_FILE,
        MANIFEST_FORMAT,
        ModelManifest,
    )

    def make(
        name: str = "m-kv", *, continuous: bool = False, max_position: int = 2048, **changes: Any
    ) -> Path:
        folder = tmp_path / name
        onnx_file = f"generatedModels/{name}_fp16_simplified.onnx"
        (folder / onnx_file).parent.mkdir(parents=True)
        write_decoder(folder / onnx_file, continuous=continuous)
        (folder / CUSTOM_IO_FILE).write_text(
            "".join(
                f" - IOName: {name}\n   Precision: float16\n"
                for name in ("past_key.0", "past_key.0_RetainedState")
            )
        )
        manifest = ModelManifest(
            format=MANIFEST_FORMAT,
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
