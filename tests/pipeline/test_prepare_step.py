"""The program that is made for a run: shapes that fit its prompts, and where it is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.compile.store import Build
from qaic_ray.errors import CompileError, DeviceError, UsageError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.option_types import Precision
from qaic_ray.options import EmulatorOptions, ModelOptions, RunOptions, VariantChoice
from qaic_ray.pipeline import prepare_step
from qaic_ray.pipeline.prepare_step import cores_here, prepare, prepare_for, program_folder
from qaic_ray.pipeline.prepare_step import shapes_for as shapes
from qaic_ray.pipeline.request import SdkChoice
from qaic_ray.sdk import Device, Sdk
from qaic_ray.worker.survey import Survey

NOTHING = VariantChoice()
positive = st.integers(1, 50_000)


@given(
    num=st.none() | st.integers(0, 2000),
    prompt=st.none() | st.integers(0, 40_000),
    answer=st.none() | positive,
    max_position=st.integers(16, 200_000),
)
def test_shapes_have_room_for_the_prompts(
    num: int | None, prompt: int | None, answer: int | None, max_position: int
) -> None:
    found = shapes(NOTHING, Survey(num, prompt, answer), max_position=max_position)
    assert found.ctx_len is not None
    assert isinstance(found.prompt_len, int)
    assert found.prompt_len <= found.ctx_len <= max_position
    needed = 2048 if prompt is None else prompt + (answer or 256)
    assert found.ctx_len >= min(needed, max_position)
    # No more than twice of what is needed, and the same as for others of about this length.
    assert found.ctx_len <= max(512, 2 * needed)
    assert found.ctx_len == max_position or (found.ctx_len // 512).bit_count() == 1
    assert found.batch_size == (1 if num == 1 else 8)
    assert found.precision is Precision.MX6


@given(
    num=st.none() | st.integers(0, 2000),
    prompt=st.none() | st.integers(0, 40_000),
    batch=positive,
    prompt_len=st.integers(0, 9).map(lambda bits: 2**bits),
    ctx=st.integers(512, 100_000),
)
def test_what_is_said_is_what_is_made(
    num: int | None, prompt: int | None, batch: int, prompt_len: int, ctx: int
) -> None:
    said = VariantChoice(
        precision=Precision.FP16, num_cores=3, batch_size=batch, prompt_len=prompt_len, ctx_len=ctx
    )
    assert shapes(said, Survey(num, prompt), max_position=100) == said


def test_short_prompts_of_many_runs_share_a_program() -> None:
    first = shapes(NOTHING, Survey(1, 3, 256), max_position=8192)
    assert first == shapes(NOTHING, Survey(1, 31, 200), max_position=8192)
    assert (first.prompt_len, first.ctx_len, first.batch_size) == (32, 512, 1)


def sdk_of(*nsps: int, version: str = "1.20", kind: str = "emulated") -> SdkChoice:
    devices = [Device(qid, "Ready", "PCIe", total, total, 2**34, 2**34) for qid, total in
               enumerate(nsps)]  # fmt: skip
    here: Any = SimpleNamespace(
        devices=lambda: devices,
        version=tuple(map(int, version.split("."))),
        label=f"{kind} SDK {version}",
    )
    return SdkChoice(here, "auto", EmulatorOptions())


def test_a_program_uses_all_of_a_card_or_of_a_part() -> None:
    mixed = sdk_of(14, 16)
    assert cores_here(mixed) == 14
    assert cores_here(mixed, (1,)) == 16
    assert cores_here(mixed, None, 2) == 7
    assert cores_here(mixed, None, 100) == 1
    assert cores_here(sdk_of()) == 14


def test_a_machine_without_a_driver_compiles_for_a_standard_card() -> None:
    def devices() -> list[Device]:
        raise DeviceError("no driver")

    here: Any = SimpleNamespace(devices=devices)
    assert cores_here(SdkChoice(here, "real", EmulatorOptions())) == 14


def test_each_model_and_sdk_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for folder in ("a/llama", "b/llama"):
        Path(folder).mkdir(parents=True)
    names = ["a/llama", "b/llama", "org/llama", "smollm2-135m", "/x/y.Q4_0.gguf", "ü / ü"]
    choices = [sdk_of(), sdk_of(version="1.14.2"), sdk_of(kind="real")]
    folders = {program_folder(ModelOptions(name=n), sdk) for n in names for sdk in choices}
    assert len(folders) == len(names) * len(choices)
    assert {folder.parent for folder in folders} == {tmp_path / "cache" / "programs"}
    # The same file, however it is named.
    whole = ModelOptions(name=str(tmp_path / "a/llama"))
    assert program_folder(whole, sdk_of()) == program_folder(ModelOptions(name="a/llama"), sdk_of())


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The two steps replaced: what they were asked for, and what the second one gives."""
    asked = SimpleNamespace(export=None, grid=None, outcome=None)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))

    def export_step(model: Any, options: Any, _: Any) -> Any:
        asked.export = options
        return SimpleNamespace(
            folder=Path(options.output), manifest=SimpleNamespace(max_position=1024)
        )

    def requested_builds(folder: Path, grid: Any, sdk: Any) -> list[Any]:
        asked.grid = grid
        return [SimpleNamespace(label="mx6", variant=None)]

    def compile_step(requests: Any, *_: Any) -> Any:
        return [(None, asked.outcome or Build(Path(asked.grid.output) / "v", "v", False, 1.0, 9))]

    monkeypatch.setattr(prepare_step, "open_model", lambda *_, **__: SimpleNamespace(base="m"))
    monkeypatch.setattr(prepare_step, "export_step", export_step)
    monkeypatch.setattr(prepare_step, "requested_builds", requested_builds)
    monkeypatch.setattr(prepare_step, "compile_step", compile_step)
    return asked


def test_what_was_made_is_said_with_how_to_have_it_otherwise(steps: SimpleNamespace) -> None:
    listener: Any = Listener()
    path = prepare(ModelOptions(name="m"), NOTHING, sdk_of(16), listener, found=Survey(1, 9, 5))
    grid = steps.grid
    assert (grid.num_cores, grid.batch_size, grid.prompt_len, grid.ctx_len) == (
        (16,), (1,), (32,), (512,)
    )  # fmt: skip
    assert path.parent.parent == Path(steps.export.output).parent
    note = " ".join(listener.notes)
    for words in ("--precision", "--batch-size", "--ctx-len", "--qpc", str(path.parent.parent)):
        assert words in note


def test_an_old_sdk_gets_the_interface_that_its_compiler_knows(steps: SimpleNamespace) -> None:
    listener: Any = Listener()
    prepare(ModelOptions(name="m"), NOTHING, sdk_of(14, version="1.14.2"), listener)
    assert (steps.export.io.value, steps.export.graph_opset) == ("cache-index", 13)
    prepare(ModelOptions(name="m"), NOTHING, sdk_of(14, version="1.16"), listener)
    assert (steps.export.io.value, steps.export.continuous_batching) == ("position-ids", True)


def test_a_compile_that_fails_is_raised(steps: SimpleNamespace) -> None:
    steps.outcome = CompileError("The compiler ended with exit code 1.")
    listener: Any = Listener()
    with pytest.raises(CompileError, match="exit code 1"):
        prepare(ModelOptions(name="m"), NOTHING, sdk_of(14), listener)
    assert listener.notes == []


def test_a_group_of_cards_needs_a_qpc_that_is_given() -> None:
    run = RunOptions(prompt="a", group_size=2)
    here: Sdk = Sdk(Path("/sdk"), "emulated", "1.20")
    listener: Any = Listener()
    with pytest.raises(UsageError, match="by --qpc"):
        prepare_for(
            ModelOptions(name="m"), run, NOTHING,
            sdk=SdkChoice(here, "auto", EmulatorOptions()), listener=listener,
        )  # fmt: skip
