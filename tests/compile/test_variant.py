"""A variant's name, argv and key; the grid of many."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qaic_ray.compile.compiler import Source, Variant, grid_variants, key_digest
from qaic_ray.contract import Specializations
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import checked
from qaic_ray.option_types import Precision, check_num_cores
from qaic_ray.options import CompileOptions
from qaic_ray.sdk import Sdk


@pytest.fixture
def source(tmp_path: Path) -> Source:
    custom_io = tmp_path / "custom_io.yaml"
    custom_io.write_text(" - IOName: past_key.0\n   Precision: float16\n")
    onnx = Path("m-kv/generatedModels/m-kv_fp16_simplified.onnx")
    return Source("m-kv", onnx, custom_io, "d" * 64)


def sdk(tmp_path: Path, apps_version: str, compiler: str) -> Sdk:
    root = tmp_path / f"sdk-{apps_version}"
    (root / "exec").mkdir(parents=True, exist_ok=True)
    (root / "exec" / compiler).touch()
    return Sdk(root, "emulated", apps_version)


def variant(source: Source, precision: Precision = Precision.MX6) -> Variant:
    shapes = Specializations.build(batch_size=1, prompt_len=256, ctx_len=2048, continuous=False)
    return Variant(source, precision, 14, shapes)


def test_argv_is_the_recipe_s_on_an_old_sdk(source: Source, tmp_path: Path) -> None:
    old = sdk(tmp_path, "1.14.2", "qaic-exec")
    argv = variant(source).argv(old, Path("specializations.json"), Path("out"))
    assert argv[0] == str(old.root / "exec" / "qaic-exec")
    # The flags of the recipe's compileModel_single_soc.sh, in any order.
    assert set(argv[1:]) == {
        f"-m={source.onnx}",
        "-aic-hw",
        "-aic-hw-version=2.0",
        "-network-specialization-config=specializations.json",
        "-convert-to-fp16",
        "-aic-num-cores=14",
        f"-custom-IO-list-file={source.custom_io}",
        "-compile-only",
        "-aic-binary-dir=out",
        "-retained-state",
        "-mxfp6-matmul",
    }


def test_argv_on_a_new_sdk_uses_its_compiler_and_hardware_name(
    source: Source, tmp_path: Path
) -> None:
    new = sdk(tmp_path, "1.22.0.119", "qaic-compile")
    argv = variant(source).argv(new, Path("s"), Path("o"))
    assert argv[0].endswith("exec/qaic-compile")
    assert "-aic-hw-version=ai100" in argv
    assert "-compile-only" not in argv
    assert (new.named_specializations, sdk(tmp_path, "1.21.6", "x").named_specializations) == (
        True,
        False,
    )


def test_fp32_converts_nothing(source: Source, tmp_path: Path) -> None:
    argv = variant(source, Precision.FP32).argv(sdk(tmp_path, "1.20", "q"), Path("s"), Path("o"))
    assert "-convert-to-fp16" not in argv
    assert not [a for a in argv if a.startswith(("-custom-IO", "-mxfp6"))]


def test_name_is_the_recipe_s_with_batch_and_precision(source: Source) -> None:
    assert variant(source).name == "m-kv-256pl-2048cl-14c-1BS-mx6"


def test_names_and_keys_tell_shapes_apart(source: Source, tmp_path: Path) -> None:
    grids = [
        (CompileOptions(batch_size=8, prompt_len=(32, "32+128"), **more), logits)
        for more, logits in (
            ({}, False),
            ({"num_speculative_tokens": 3}, True),
            ({"comp_ctx_lengths": (512, 1024)}, False),
            ({"prefill_rows": 4}, False),
            ({"prefill_rows": 8, "num_speculative_tokens": 3}, True),
        )
    ]
    variants = [
        variant
        for grid, logits in grids
        for variant in grid_variants(source, grid, continuous=True, num_logits_to_keep=logits)
    ]
    assert [v.name for v in variants] == [
        "m-kv-32pl-2048cl-14c-8BS-mx6",
        "m-kv-32+128pl-2048cl-14c-8BS-mx6",
        "m-kv-32pl-2048cl-14c-8BS-3spec-mx6",
        "m-kv-32+128pl-2048cl-14c-8BS-3spec-mx6",
        "m-kv-32pl-512+1024+2048cl-14c-8BS-mx6",
        "m-kv-32+128pl-512+1024+2048cl-14c-8BS-mx6",
        "m-kv-32pl-2048cl-14c-8BS-4rows-mx6",
        "m-kv-32+128pl-2048cl-14c-8BS-4rows-mx6",
        "m-kv-32pl-2048cl-14c-8BS-8rows-3spec-mx6",
        "m-kv-32+128pl-2048cl-14c-8BS-8rows-3spec-mx6",
    ]
    here = sdk(tmp_path, "1.20", "qaic-exec")
    assert len({key_digest(v.key_entries(here, "a")) for v in variants}) == len(variants)
    assert variants[3].label == "mx6 14c pl32+128 cl2048 bs8 spec3"
    assert variants[-1].label == "mx6 14c pl32+128 cl2048 bs8 rows8 spec3"


def test_shapes_that_a_name_cannot_say_have_a_mark_in_it(source: Source) -> None:
    usual = variant(source).specializations
    prefill, decode = usual.entries
    longer = Specializations((prefill, replace(prefill, seq_len=4), decode))
    names = {
        Variant(source, Precision.FP16, 14, shapes).name
        for shapes in (
            usual,
            longer,
            Specializations((decode, prefill)),
            Specializations((replace(decode, batch_size=2, full_batch_size=4),)),
            Specializations((replace(decode, batch_size=4, full_batch_size=4),)),
        )
    }
    plain = {
        "m-kv-256pl-2048cl-14c-1BS-fp16",
        "m-kv-4+256pl-2048cl-14c-1BS-fp16",
        "m-kv-1pl-2048cl-14c-4BS-fp16",
    }
    assert plain < names
    (marked,) = names - plain
    assert re.fullmatch(r"m-kv-1pl-2048cl-14c-4BS-[0-9a-f]{6}-fp16", marked)


def test_every_input_of_the_compile_changes_the_key(source: Source, tmp_path: Path) -> None:
    base = variant(source)
    here = sdk(tmp_path, "1.20", "qaic-exec")
    shapes = Specializations.build(batch_size=2, prompt_len=256, ctx_len=2048, continuous=False)
    keys = [
        key_digest(v.key_entries(s, digest))
        for v, s, digest in [
            (base, here, "a"),
            (base, here, "b"),
            (base, sdk(tmp_path, "1.17", "qaic-exec"), "a"),
            (replace(base, precision=Precision.FP16), here, "a"),
            (replace(base, num_cores=7), here, "a"),
            (replace(base, specializations=shapes), here, "a"),
            (replace(base, source=replace(source, digest="e" * 64)), here, "a"),
        ]
    ]
    assert source.custom_io is not None
    source.custom_io.write_text(" - IOName: past_key.0\n   Precision: mxint8\n")
    keys.append(key_digest(base.key_entries(here, "a")))
    assert len(set(keys)) == len(keys)


def test_key_does_not_depend_on_where_things_stand(source: Source, tmp_path: Path) -> None:
    here = sdk(tmp_path, "1.20", "qaic-exec")
    moved_sdk = replace(here, root=tmp_path / "elsewhere")
    moved = replace(source, onnx=Path("/other/model.onnx"))
    assert variant(source).key_entries(here, "a") == variant(moved).key_entries(moved_sdk, "a")


@pytest.mark.parametrize("cores", [0, 17, -1])
def test_impossible_core_counts_are_refused(cores: int) -> None:
    with pytest.raises(UsageError, match=f"from 1 to 16, not {cores}"):
        check_num_cores(cores)


def test_unknown_precision_is_refused_naming_what_there_is() -> None:
    with pytest.raises(UsageError, match="fp16, mx6, fp32, not 'mx7'"):
        checked(CompileOptions, {"precision": "mx7"}, "compile")


def test_grid_is_every_combination(source: Source) -> None:
    grid = CompileOptions(
        precision=("mx6", "fp16"), num_cores=(7, 14), prompt_len=(32, 128), ctx_len=512
    )
    names = [v.name for v in grid_variants(source, grid, continuous=True)]
    assert len(set(names)) == len(names) == 8
    assert names[0] == "m-kv-32pl-512cl-7c-1BS-mx6"
