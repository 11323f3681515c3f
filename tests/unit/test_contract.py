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


@given(
    batch_size=st.integers(1, 64),
    prompt_len=st.sampled_from([1, 2, 32, 128]),
    ctx_len=st.integers(256, 4096),
    continuous=st.booleans(),
    speculated=st.sampled_from([0, 0, 1, 6]),
    contexts=st.sampled_from([(), (), (256,), (130, 192)]),
)
def test_both_forms_of_the_file_read_back_equal(
    batch_size: int,
    prompt_len: int,
    ctx_len: int,
    continuous: bool,
    speculated: int,
    contexts: tuple[int, ...],
) -> None:
    shapes = Specializations.build(
        batch_size=batch_size,
        prompt_len=prompt_len,
        ctx_len=ctx_len,
        continuous=continuous,
        num_speculative_tokens=speculated,
        comp_ctx_lengths=contexts,
    )
    assert shapes.decode_len == speculated + 1
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
        ([PREFILL, {**DECODE, "seq_len": "2"}], "with seq_len 1 .*; seq_len here: 32, 2"),
        ([PREFILL, DECODE, DECODE], "Two specializations are equal"),
        ([PREFILL, {**DECODE, "num_logits_to_keep": "1"}], "num_logits_to_keep must be in every"),
        ([PREFILL, {**DECODE, "comp_ctx_lengths": "64"}], "comp_ctx_lengths must be in every"),
        (
            [{**PREFILL, "num_logits_to_keep": "2"}, {**DECODE, "num_logits_to_keep": "1"}],
            "num_logits_to_keep must be 1 .* not 2 where seq_len is 32",
        ),
        (
            [{**PREFILL, "comp_ctx_lengths": "16"}, {**DECODE, "comp_ctx_lengths": "128"}],
            "seq_len 32 does not fit into comp_ctx_lengths 16",
        ),
        ([{**DECODE, "comp_ctx_lengths": "256"}], "comp_ctx_lengths 256 does not fit into ctx_len"),
        ([{**DECODE, "comp_ctx_lengths": "64"}], r"must be ctx_len \(128\): with 64 at most"),
        (
            [{**PREFILL, "comp_ctx_lengths": "128"}, {**DECODE, "comp_ctx_lengths": "128"}],
            "both of a prefill and of a decode .* give the prefill one 96",
        ),
        (
            [
                {"batch_size": "1", "seq_len": "32", "ctx_len": "128", "full_batch_size": "4"},
                {**DECODE, "batch_size": "2", "full_batch_size": "4"},
                {**DECODE, "seq_len": "1", "batch_size": "4", "full_batch_size": "4"},
            ],
            "batch_size must be the same .* 2 and 4",
        ),
        ([{**PREFILL, "seq_len": "256"}, DECODE], "256 does not fit into ctx_len 128"),
        ([{**PREFILL, "batch_size": "0"}, DECODE], "batch_size must be at least 1, not 0"),
        ([{**PREFILL, "ctx_length": "1"}, DECODE], "unknown key 'ctx_length'"),
        (
            [{**PREFILL, "prompt_length": "32"}, DECODE],
            "says seq_len twice, once as 'prompt_length'",
        ),
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


@pytest.mark.parametrize("prompt", ["prompt_length", "prompt_len", "input_len", "seq_len"])
@pytest.mark.parametrize("context", ["context_length", "context_len", "ctx_len"])
def test_the_recipe_s_other_words_for_its_keys_are_read(prompt: str, context: str) -> None:
    entries = [{"batch_size": "1", prompt: length, context: "128"} for length in ("32", "1")]
    text = json.dumps({"specializations": entries})
    assert Specializations.from_json(text, source="a file") == Specializations.build(
        batch_size=1, prompt_len=32, ctx_len=128, continuous=False
    )


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecializationError, match=r"gone\.json"):
        Specializations.load(tmp_path / "gone.json")


def test_more_decode_rows_than_slots_are_refused() -> None:
    with pytest.raises(SpecializationError, match="more than its full_batch_size 4"):
        Specializations((Specialization(8, 1, 128, 4),))


def test_a_prefill_has_any_number_of_rows_up_to_the_slots() -> None:
    one = Specializations.build(batch_size=4, prompt_len=(8, 32), ctx_len=128, continuous=True)
    many = one.with_prefill_rows(3)
    assert [(s.batch_size, s.seq_len) for s in many.entries] == [(3, 8), (3, 32), (4, 1)]
    assert Specializations.from_json(many.to_json(named=True), source="a file") == many
    assert many.with_prefill_rows(1) == one
    with pytest.raises(SpecializationError, match=r"5, of .* seq_len 8, is more than .* 4"):
        one.with_prefill_rows(5)


def test_retained_state_names_pair_up() -> None:
    assert contract.past_names(2) == [
        "past_key.0", "past_value.0", "past_key.1", "past_value.1"
    ]  # fmt: skip
    for name in contract.past_names(2):
        assert contract.is_past(name)
        assert contract.is_past(contract.retained(name))
    assert not contract.is_past(contract.LOGITS)


def test_several_prefill_lengths_in_one_program() -> None:
    shapes = Specializations.build(
        batch_size=8, prompt_len=(128, 1, 32), ctx_len=1024, continuous=True
    )
    assert [s.seq_len for s in shapes.prefills] == [32, 128]
    assert [s.seq_len for s in shapes.decodes] == [shapes.decode_len] == [1]
    assert (shapes.prompt_len, shapes.prefill.batch_size, shapes.decode.batch_size) == (128, 1, 8)
    named = json.loads(shapes.to_json(named=True))["specializations"]
    assert [entry["name"] for entry in named] == ["Prefill_0", "Prefill_1", "Decode"]


def test_speculation_has_logits_of_all_its_tokens() -> None:
    shapes = Specializations.build(
        batch_size=4, prompt_len=32, ctx_len=128, continuous=True, num_speculative_tokens=3
    )
    # As QEfficient writes it for a target model: num_speculative_tokens 3, full_batch_size 4.
    assert [s.symbols() for s in shapes.entries] == [
        {"batch_size": "1", "seq_len": "32", "ctx_len": "128", "full_batch_size": "4",
         "num_logits_to_keep": "1"},
        {"batch_size": "4", "seq_len": "4", "ctx_len": "128", "full_batch_size": "4",
         "num_logits_to_keep": "4"},
    ]  # fmt: skip
    assert (shapes.decode_len, shapes.prompt_len, shapes.decode.is_decode) == (4, 32, True)
    one = Specialization(4, 1, 128, 4, 1)
    both = Specializations((*shapes.entries, one))
    assert (both.decode, both.decode_len, both.decodes[0]) == (one, 4, one)
    alone = Specializations((shapes.decodes[0],))
    assert (alone.prefills, alone.prompt_len, alone.prefill) == ((), 1, alone.decode)


@pytest.mark.parametrize(
    ("ctx_len", "given", "prefill", "decode"),
    [
        # QEfficient's own rule for values that collide: 4096 becomes 4064.
        (4096, (1024, 2048, 4096), 4064, [1024, 2048, 4096]),
        (4096, (1024,), 4064, [1024, 4096]),
        (128, (96, 64), 32, [64, 96, 128]),
        (32, (16,), 31, [16, 32]),
    ],
)
def test_contexts_of_prefill_and_decode_are_not_shared(
    ctx_len: int, given: tuple[int, ...], prefill: int, decode: list[int]
) -> None:
    shapes = Specializations.build(
        batch_size=1, prompt_len=16, ctx_len=ctx_len, continuous=False, comp_ctx_lengths=given
    )
    assert [s.reach for s in shapes.prefills] == [prefill]
    assert [s.comp_ctx_lengths for s in shapes.decodes] == decode
    assert shapes.decode.reach == shapes.ctx_len == ctx_len
    names = [e["name"] for e in json.loads(shapes.to_json(named=True))["specializations"]]
    assert names == ["Prefill", *(f"Decode_{i}" for i in range(len(decode)))]


QEFFICIENT = {
    # Rows, tokens, context, and what else a specialization of its files has.
    "target of speculation, 0 or 3 tokens": [
        (1, 32, 128, {"num_logits_to_keep": "1"}),
        (1, 1, 128, {"num_logits_to_keep": "1"}),
        (1, 4, 128, {"num_logits_to_keep": "4"}),
    ],
    "contexts": [
        *((1, 128, 4096, {"comp_ctx_lengths": str(n)}) for n in (992, 4064)),
        *((1, 1, 4096, {"comp_ctx_lengths": str(n)}) for n in (1024, 2048, 4096)),
    ],
    "decode only": [(8, 1, 128, {"full_batch_exec_size": "8", "full_batch_size": "8"})],
}


@pytest.mark.parametrize("name", QEFFICIENT)
def test_files_of_qefficient_are_read(name: str) -> None:
    entries = [
        {
            "name": f"Any_{index}",
            "symbols": {"batch_size": str(rows), "seq_len": str(seq_len), "ctx_len": str(ctx_len)}
            | more,
        }
        for index, (rows, seq_len, ctx_len, more) in enumerate(QEFFICIENT[name])
    ]
    shapes = Specializations.from_json(document(*entries), source="specializations.json")
    found = [(s.seq_len, s.reach) for s in (*shapes.prefills, *shapes.decodes)]
    assert (
        found
        == {
            "target of speculation, 0 or 3 tokens": [(32, 128), (1, 128), (4, 128)],
            "contexts": [(128, 992), (128, 4064), (1, 1024), (1, 2048), (1, 4096)],
            "decode only": [(1, 128)],
        }[name]
    )


def test_num_logits_to_keep_is_read_and_written() -> None:
    text = Specializations(
        (Specialization(1, 8, 32, None, 1), Specialization(1, 1, 32, None, 1))
    ).to_json(named=False)
    assert '"num_logits_to_keep": "1"' in text
    assert Specializations.from_json(text, source="f").decode.num_logits_to_keep == 1
    with pytest.raises(SpecializationError, match="num_logits_to_keep must be at least 1, not 0"):
        Specializations((Specialization(1, 1, 32, None, 0),))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"specializations": [{"batch_size": 1e400}]}', "whole number, not inf"),
        ('{"specializations": [{"batch_size": 1.5}]}', "whole number, not 1.5"),
        ('{"specializations": [{"batch_size": "%s"}]}' % ("9" * 5000), "whole number, not '999"),
        ('{"specializations": [{"batch_size": %s}]}' % ("9" * 5000), "is not JSON that can"),
        ('{"specializations": [{"%s": 1}]}' % ("k" * 5000), "unknown key 'kkk"),
        (
            '{"specializations": [{"batch_size": 1, "seq_len": 1, "ctx_len": 4294967296}]}',
            "ctx_len must be at most 2147483647, not 4294967296",
        ),
        (
            '{"specializations": [%s]}'  # noqa: UP031
            % ",".join(['{"batch_size": 1, "seq_len": 1, "ctx_len": 8}'] * 5000),
            "1 to 1000 specializations, not 1001",
        ),
        ("[" * 100_000, "nested too deep"),
    ],
    ids=range(8),
)
def test_files_of_odd_numbers_are_refused_in_a_short_sentence(text: str, words: str) -> None:
    with pytest.raises(SpecializationError, match=words) as caught:
        Specializations.from_json(text, source="f")
    assert len(str(caught.value)) < 400


def test_a_context_of_billions_costs_nothing() -> None:
    taken = (2**31 - 32, 2**31 - 64)
    shapes = Specializations.build(
        batch_size=1, prompt_len=16, ctx_len=2**31 - 1, continuous=False, comp_ctx_lengths=taken
    )
    assert [s.reach for s in shapes.prefills] == [2**31 - 96]
