"""The names of the recipe's compileModel.sh: links to the variant compiled last, and only links."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.compile.compiler import Source, Variant
from qaic_ray.compile.recipe_names import led_to, link_recipe_names, recipe_names
from qaic_ray.compile.store import VARIANT_FILE, BuildRequest
from qaic_ray.contract import Specialization, Specializations
from qaic_ray.option_types import Precision
from qaic_ray.sdk import Sdk

HASH = "e691febcfceb864f235225f4e6dcae07e2be6332"
# As the recipe's text and its later script have it.
FIRST = f"{HASH}-kv-256pl-2048cl-14c"
LATER = f"{HASH}-kv-256pl-2048cl-14c-1BS"
SHAPES = Specializations.build(batch_size=1, prompt_len=256, ctx_len=2048, continuous=False)
SOURCE = Source(f"{HASH}-kv", Path("m.onnx"), None, "d" * 64)
SDK = Sdk.__new__(Sdk)  # no name depends on it
MX6 = Variant(SOURCE, Precision.MX6, 14, SHAPES)


def compiled(store: Path, variant: Variant = MX6) -> BuildRequest:
    request = BuildRequest(variant, SDK, store)
    request.target.mkdir(parents=True, exist_ok=True)
    (request.target / VARIANT_FILE).write_text("{}")
    return request


def test_names_are_those_of_the_scripts() -> None:
    assert recipe_names(MX6) == [FIRST, LATER]
    decode_only = Specializations((Specialization(64, 1, 256),))
    assert recipe_names(replace(MX6, specializations=decode_only, num_cores=16)) == [
        f"{HASH}-kv-1pl-256cl-16c",
        f"{HASH}-kv-1pl-256cl-16c-64BS",
    ]


def test_what_the_recipe_cannot_run_has_no_name_of_its() -> None:
    slots = Specializations.build(batch_size=8, prompt_len=32, ctx_len=128, continuous=True)
    assert recipe_names(replace(MX6, specializations=slots)) == []
    assert recipe_names(replace(MX6, precision=Precision.FP32)) == []


def test_the_links_are_relative_so_that_the_store_may_be_moved(tmp_path: Path) -> None:
    request = compiled(tmp_path / "qpc")
    assert link_recipe_names(request) == []
    for name in (FIRST, LATER):
        assert os.readlink(request.store / name) == MX6.name
    moved = (tmp_path / "qpc").rename(tmp_path / "elsewhere")
    assert (moved / FIRST).resolve() == (moved / MX6.name).resolve()
    assert led_to(moved / FIRST) == moved / MX6.name
    assert link_recipe_names(compiled(moved)) == []  # again: nothing to say


def test_the_newest_compile_has_the_name_and_it_is_said(tmp_path: Path) -> None:
    link_recipe_names(compiled(tmp_path))
    fp16 = compiled(tmp_path, replace(MX6, precision=Precision.FP16))
    (said,) = link_recipe_names(fp16)
    assert FIRST in said
    assert LATER in said
    assert said.endswith(f" now lead to {LATER}-fp16, not to {LATER}-mx6 any more.")
    assert led_to(tmp_path / FIRST) == fp16.target


def test_a_link_to_a_variant_that_was_removed_is_led_anew(tmp_path: Path) -> None:
    link_recipe_names(compiled(tmp_path))
    shutil.rmtree(tmp_path / MX6.name)
    fp16 = compiled(tmp_path, replace(MX6, precision=Precision.FP16))
    link_recipe_names(fp16)
    assert (tmp_path / LATER).resolve() == fp16.target.resolve()


@pytest.mark.parametrize("kind", ["folder", "file", "link away", "link to another's folder"])
def test_what_is_not_ours_stays(tmp_path: Path, kind: str) -> None:
    """A folder may be the QPC that the recipe's own script compiled there."""
    store, there = tmp_path / "qpc", tmp_path / "qpc" / FIRST
    request = compiled(store)
    if kind == "folder":
        there.mkdir()
        (there / "programqpc.bin").write_bytes(b"theirs")
    elif kind == "file":
        there.write_text("theirs")
    elif kind == "link away":
        there.symlink_to(request.target)  # absolute, as we make none
    else:
        theirs = f"{FIRST}-1BS-fp16"
        (store / theirs).mkdir()
        there.symlink_to(theirs)
    before = os.readlink(there) if there.is_symlink() else sorted(map(str, there.rglob("*")))
    (said,) = link_recipe_names(request)
    assert said == f"{there} is not a link of ours, and stays: the QPC is {request.target}."
    assert before == (
        os.readlink(there) if there.is_symlink() else sorted(map(str, there.rglob("*")))
    )
    assert led_to(store / LATER) == request.target
    assert led_to(there) is None


def test_a_store_that_takes_no_link_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_recipe_names(compiled(tmp_path))
    fp16 = compiled(tmp_path, replace(MX6, precision=Precision.FP16))

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    said = link_recipe_names(fp16)
    assert len(said) == 2
    assert all("cannot be made a link" in line and "Read-only" in line for line in said)
    names = {FIRST, LATER, MX6.name, fp16.target.name}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert led_to(tmp_path / FIRST) == tmp_path / MX6.name


@given(
    st.lists(
        st.tuples(
            st.sampled_from([Precision.MX6, Precision.FP16]),
            st.sampled_from([14, 16]),
            st.sampled_from([1, 4]),
            st.sampled_from([(32,), (32, 64)]),
        ),
        max_size=8,
    )
)
def test_after_any_order_of_compiles_each_name_leads_to_the_last_of_its_variants(
    tmp_path_factory: pytest.TempPathFactory,
    compiles: list[tuple[Precision, int, int, tuple[int, ...]]],
) -> None:
    store = tmp_path_factory.mktemp("qpc")
    last: dict[str, str] = {}
    for precision, cores, batch, lens in compiles:
        shapes = Specializations.build(
            batch_size=batch, prompt_len=lens, ctx_len=128, continuous=False
        )
        variant = Variant(SOURCE, precision, cores, shapes)
        said = link_recipe_names(compiled(store, variant))
        moved = [n for n in recipe_names(variant) if last.get(n, variant.name) != variant.name]
        names = " and ".join(said).replace(" now lead", " and ").split(" and ")
        assert [name for name in names if name in recipe_names(variant)] == moved
        last |= dict.fromkeys(recipe_names(variant), variant.name)
    for name, target in last.items():
        assert led_to(store / name) == store / target
    assert {path.name for path in store.iterdir() if path.is_symlink()} == last.keys()
    assert not list(store.glob(".*"))
