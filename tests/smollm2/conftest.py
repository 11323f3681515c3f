"""The real model, exported and compiled once a session; no Ray here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qaic_ray.compile.compiler import Variant
from qaic_ray.compile.store import BuildRequest, build
from qaic_ray.contract import Specializations
from qaic_ray.model.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.option_types import Precision
from qaic_ray.options import EmulatorOptions
from qaic_ray.pipeline.compile_step import open_folder
from qaic_ray.sdk import Sdk, find_sdk

PROMPTS = Path(__file__).parents[2] / "jobs" / "prompts" / "english.jsonl"
CTX_LEN = 512
PROMPT_LEN = 64


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """SmolLM2-135M-Instruct, from the user's cache or fetched into it."""
    return open_checkpoint("smollm2-135m")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="session")
def torch_model(checkpoint: Checkpoint) -> Any:
    """transformers' own model: the truth."""
    from qaic_ray.model.checkpoint import load_torch_model

    return load_torch_model(checkpoint)


@pytest.fixture(scope="session")
def emulated_sdk() -> Sdk:
    return find_sdk("emulated", EmulatorOptions())


@pytest.fixture(scope="session")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder, continuous batching."""
    from qaic_ray.export.export import export_model
    from qaic_ray.options import ExportOptions

    folder = tmp_path_factory.mktemp("export") / "smollm2-135m-kv"
    options = ExportOptions(continuous_batching=True)
    return export_model(checkpoint, options, output=folder, verify="off").folder


@pytest.fixture(scope="session")
def qpc(
    exported: Path, emulated_sdk: Sdk, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Precision, int], Path]:
    """A QPC folder by precision and number of slots."""
    store = tmp_path_factory.mktemp("qpc")

    def compiled(precision: Precision, slots: int) -> Path:
        shapes = Specializations.build(
            batch_size=slots, prompt_len=PROMPT_LEN, ctx_len=CTX_LEN, continuous=True
        )
        variant = Variant(open_folder(exported).source, precision, 14, shapes)
        return build(BuildRequest(variant, emulated_sdk, store)).path

    return compiled


@pytest.fixture(scope="session")
def prompts(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """32 of the demo's prompts as token ids, 5 to 400 tokens, in the file's shuffled order."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    every = [tuple(tokenizer.encode(json.loads(line)["prompt"])) for line in lines]
    chosen = every[::2]
    longest, shortest = max(every, key=len), min(every, key=len)
    for extreme in (longest, shortest):
        if extreme not in chosen:
            chosen[chosen.index(sorted(chosen, key=len)[len(chosen) // 2])] = extreme
    assert len(chosen) == 32
    assert min(map(len, chosen)) == 5
    assert 380 <= max(map(len, chosen)) <= 400
    return chosen


@pytest.fixture(scope="module", autouse=True)
def _all_cores() -> Iterator[None]:
    """One program at a time runs here: it may have every core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAIC_EMULATOR_THREADS", str(os.cpu_count() or 1))
        yield
