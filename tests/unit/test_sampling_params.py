"""Sampling parameters: what they allow, and how a JSON object changes them."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from qaic_ray.errors import RowError
from qaic_ray.sampling_params import FIELDS, SamplingParams, TokenLogprob
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs


def test_nothing_asked_for_is_plain_greedy() -> None:
    params = SamplingParams()
    assert params.is_greedy
    assert params.is_plain
    assert not params.has_penalties


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.5},
        {"frequency_penalty": 0.1},
        {"min_tokens": 1},
        {"logprobs": 0},
        {"temperature": 1e-5},
        {"structured_outputs": StructuredOutputs(regex="a")},
        {"logit_bias": ((3, 1.0),)},
        {"allowed_token_ids": (3,)},
        {"bad_words": ("x",)},
    ],
)
def test_what_needs_more_than_an_argmax_is_not_plain(fields: dict[str, Any]) -> None:
    assert not SamplingParams(**fields).is_plain


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 1e-6}, {"top_k": 5, "top_p": 0.1, "min_p": 0.5}, {"stop": ("x",)}],
)
def test_what_changes_no_choice_is_plain(fields: dict[str, Any]) -> None:
    assert SamplingParams(**fields).is_plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 100.5),
        ("temperature", "1"),
        ("temperature", False),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("max_tokens", 2**31),
        ("min_tokens", 2**31),
        ("n", 129),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-30),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.01),
        ("frequency_penalty", -2.01),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("2",)),
        ("stop_token_ids", (10**20,)),
        ("include_stop_str_in_output", 1),
        ("ignore_eos", None),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("structured_outputs", "[a-z]"),
        ("logit_bias", ((3, 100.5),)),
        ("logit_bias", ((3, math.nan),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((3, "1"),)),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (-1,)),
        ("bad_words", ("",)),
        ("skip_special_tokens", 1),
        ("bad_words", (3,)),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_field_and_what_is_allowed(
    field: str, value: Any
) -> None:
    with pytest.raises(RowError) as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(f"{field} is {value!r}; allowed is ")


HUGE = 10**400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, HUGE) for name in ("n", "max_tokens", "min_tokens", "temperature", "top_k")),
        *((name, HUGE) for name in ("top_p", "repetition_penalty", "seed", "logprobs")),
        ("stop_token_ids", (HUGE,)),
        ("stop_token_ids", (1,) * 1025),
        ("stop_token_ids", ("x",) * 1_000_000),
        ("stop", ("a",) * 65),
        ("stop", ("a" * 4097,)),
        ("stop", ("a" * 4096, "b")),
        ("stop", "a" * 1_000_000),
        ("stop", ("\ud800",)),
        ("logit_bias", ((HUGE, 1.0),)),
        ("logit_bias", tuple((token, 1.0) for token in range(1025))),
        ("allowed_token_ids", ("x",) * 1_000_000),
        ("bad_words", ("a",) * 1025),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_no_memory_should_hold_is_refused_in_a_short_sentence(field: str, value: Any) -> None:
    with pytest.raises(RowError) as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(f"{field} is ")
    assert len(str(error.value)) < 300


def test_the_edges_of_the_ranges_are_allowed() -> None:
    params = SamplingParams(
        temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2
    )
    assert SamplingParams(top_k=2**31 - 1, seed=2**63 - 1, logprobs=20) != params
    stops = SamplingParams(stop=("a" * 64,) * 64, stop_token_ids=tuple(range(1024)))
    assert (len(stops.stop), len(stops.stop_token_ids)) == (64, 1024)
    assert SamplingParams(n=128, temperature=100, repetition_penalty=0.01).n == 128
    # A number is a number: as JSON has it, and as a table of floats does.
    assert SamplingParams(temperature=1) == SamplingParams(temperature=1.0)
    assert isinstance(SamplingParams(temperature=1).temperature, float)


def test_min_tokens_over_max_tokens_are_refused() -> None:
    with pytest.raises(RowError, match="min_tokens is 5; allowed is at most max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4


def test_several_greedy_answers_are_refused() -> None:
    with pytest.raises(RowError, match=r"n is 2; .* set a temperature"):
        SamplingParams(n=2)
    assert SamplingParams(n=2, temperature=0.5).n == 2


def test_a_json_object_changes_the_fields_it_names() -> None:
    defaults = SamplingParams(temperature=0.7, max_tokens=10, stop=("a",), seed=3)
    changed = defaults.updated(
        {"stop": ["x", "y"], "max_completion_tokens": 5, "stop_token_ids": [7], "seed": None}
    )
    assert changed == SamplingParams(
        temperature=0.7, max_tokens=5, stop=("x", "y"), stop_token_ids=(7,)
    )
    assert defaults.updated({"stop": "END"}).stop == ("END",)
    assert defaults.updated({"stop": None}).stop == ()
    assert defaults.updated({"max_tokens": None}).max_tokens is None
    assert defaults.updated({}) == defaults
    same = {"max_tokens": 4, "max_completion_tokens": 4}
    assert defaults.updated(same).max_tokens == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temprature": 1}, "'temprature' is no sampling parameter: did you mean temperature?"),
        ({"zzz": 1}, "'zzz' is no sampling parameter: known are n, max_tokens"),
        ({"temperature": None}, "temperature is None"),
        ({"stop": [3]}, "stop is"),
        ({"stop": {"a": 1}}, "stop is"),
        ({"max_completion_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "give one of them"),
        ({7: 1}, "7 is no sampling parameter"),
        ({"x" * 10**6: 1}, "is no sampling parameter"),
    ],
)
def test_a_json_object_with_a_fault_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as error:
        SamplingParams().updated(fields)
    assert words in str(error.value)
    assert len(str(error.value)) < 500


def test_every_known_field_can_be_given() -> None:
    plain = SamplingParams(temperature=0.5)
    for name in FIELDS:
        value = getattr(plain, name, 9)
        assert plain.updated({name: list(value) if isinstance(value, tuple) else value})
    assert "max_completion_tokens" in FIELDS


def test_parameters_and_logprobs_cross_processes() -> None:
    for value in (
        SamplingParams(temperature=0.5, stop=("a",)),
        TokenLogprob(3, -0.5, ((3, -0.5),)),
    ):
        assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    ("written", "pairs"),
    [
        ({"198": -100, "13": 2.5}, ((13, 2.5), (198, -100.0))),
        ({198: -100.0, 13: 2.5}, ((13, 2.5), (198, -100.0))),
        ([[198, -100], [13, 2.5]], ((13, 2.5), (198, -100.0))),
        ({}, ()),
        (None, ()),
    ],
)
def test_biases_are_read_as_each_program_writes_them(written: Any, pairs: Any) -> None:
    assert SamplingParams().updated({"logit_bias": written}).logit_bias == pairs


@pytest.mark.parametrize("written", [{"x": 1}, {"1": 1, " 1": 2}, [1], [[1, 2, 3]], {"1": None}, 5])
def test_biases_that_are_none_are_refused(written: Any) -> None:
    with pytest.raises(RowError, match=r"logit_bias is .*; allowed is an object of up to 1024"):
        SamplingParams().updated({"logit_bias": written})
