"""Specializations: what the compiler's scripts expect, and what they must not be given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray import contract
from qaic_ray.contract import Specialization, Specializations
from qaic_ray.errors import SpecializationError

CONFIGS = Path(__file__).parents[2] / "configs" / "specializations"


def document(*entries: dict[str, object]) -> str:
    return json.dumps({"specializations": list(entries)})


def test_flat_json_is_the_recipe_s_own_form() -> None:
    shapes = Specializations.build(batch_size=1, prompt_len=256, ctx_len=2048, continuous=False)
    assert json.loads(shapes.to_json(named=False)) == {
        "specializations": [
            {"batch_size": "1", "seq_len": "256", "ctx_len": "2048"},
            {"batch_size": "1", "seq_len": "1", "ctx_len": "2048"},
        ]
    }


def test_continuous_batching_prefills_one_row_and_decodes_all_slots() -> None:
    shapes = Specializations.build(batch_size=8, prompt_len=128, ctx_len=1024, continuous=True)
    named = json.loads(shapes.to_json(named=True))["specializations"]
    slots = {"ctx_len": "1024", "full_batch_size": "8"}
    assert named == [
        {"name": "Prefill", "symbols": {"batch_size": "1", "seq_len": "128", **slots}},
        {"name": "Decode", "symbols": {"batch_size": "8", "seq_len": "1", **slots}},
    ]


@given(st.integers(1, 64), st.sampled_from([1, 2, 32, 256]), st.integers(256, 4096), st.booleans())
def test_both_forms_of_the_file_read_back_equal(
    batch_size: int, prompt_len: int, ctx_len: int, continuous: bool
) -> None:
    shapes = Specializations.build(
        batch_size=batch_size, prompt_len=prompt_len, ctx_len=ctx_len, continuous=continuous
    )
    for named in (False, True):
        assert Specializations.from_json(shapes.to_json(named=named), source="x") == shapes
    assert (shapes.batch_size, shapes.prompt_len) == (batch_size, prompt_len)
    assert (shapes.ctx_len, shapes.continuous) == (ctx_len, continuous)


def test_files_that_we_ship_are_read() -> None:
    files = sorted(CONFIGS.glob("*.json"))
    assert files
    for path in files:
        shapes = Specializations.load(path)
        assert f"pl{shapes.prompt_len}-cl{shapes.ctx_len}-bs{shapes.batch_size}" in path.name
        assert shapes.continuous == ("continuous" in path.name)


PREFILL = {"batch_size": "1", "seq_len": "32", "ctx_len": "128"}
DECODE = {"batch_size": "1", "seq_len": "1", "ctx_len": "128"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([PREFILL, {**DECODE, "ctx_len": "256"}], "ctx_len must be the same .* 128 and 256"),
        ([PREFILL, {**DECODE, "batch_size": "2"}], "batch_size must be the same .* 1 and 2"),
        ([{**PREFILL, "seq_len": "48"}, DECODE], "power of two, not 48"),
        ([PREFILL, {**DECODE, "seq_len": "2"}], "with seq_len 1; seq_len here: 32, 2"),
        ([PREFILL, DECODE, DECODE], "Exactly one"),
        ([{**PREFILL, "seq_len": "256"}, DECODE], "256 does not fit into ctx_len 128"),
        ([{**PREFILL, "batch_size": "0"}, DECODE], "batch_size must be at least 1, not 0"),
        ([{**PREFILL, "ctx_length": "1"}, DECODE], "unknown key 'ctx_length'"),
        ([{**PREFILL, "seq_len": "many"}, DECODE], "seq_len .* whole number, not 'many'"),
        ([{"batch_size": "1", "seq_len": "32"}, DECODE], "lacks ctx_len"),
        (["prefill", DECODE], "must be an object"),
        ([], "must be an object whose 'specializations' is a list"),
    ],
)
def test_shapes_that_cannot_live_together_are_refused(
    entries: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(SpecializationError, match=message):
        Specializations.from_json(document(*entries), source="specializations.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "7", '{"specializations": {}}'])
def test_files_of_another_kind_are_refused_with_their_name(text: str) -> None:
    with pytest.raises(SpecializationError, match=r"my\.json"):
        Specializations.from_json(text, source="my.json")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecializationError, match=r"gone\.json"):
        Specializations.load(tmp_path / "gone.json")


def test_more_decode_rows_than_slots_are_refused() -> None:
    with pytest.raises(SpecializationError, match="more than its full_batch_size 4"):
        Specializations((Specialization(8, 1, 128, 4),))


def test_retained_state_names_pair_up() -> None:
    assert contract.past_names(2) == [
        "past_key.0", "past_value.0", "past_key.1", "past_value.1"
    ]  # fmt: skip
    for name in contract.past_names(2):
        assert contract.is_past(name)
        assert contract.is_past(contract.retained(name))
    assert not contract.is_past(contract.LOGITS)


def test_num_logits_to_keep_is_read_and_written() -> None:
    text = Specializations(
        (Specialization(1, 8, 32, None, 1), Specialization(1, 1, 32, None, 1))
    ).to_json(named=False)
    assert '"num_logits_to_keep": "1"' in text
    assert Specializations.from_json(text, source="f").decode.num_logits_to_keep == 1
    with pytest.raises(SpecializationError, match="num_logits_to_keep must be at least 1, not 0"):
        Specializations((Specialization(1, 1, 32, None, 0),))
