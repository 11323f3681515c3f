"""The types of a job's values: what a key may hold, and the sentence where it does not.

Knows no key.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, PlainSerializer

from qaic_ray.contract import MAX_CORES, MAX_SIZE
from qaic_ray.documents import user_path
from qaic_ray.errors import RowError, UsageError
from qaic_ray.sampling_params import SamplingParams

PrecisionName = Literal["mx6", "fp16", "fp32"]
Sku = Literal["standard", "pro", "ultra"]
AppsVersion = Literal["1.14.2", "1.17", "1.20", "1.21.6", "1.22"]
_LENGTH = re.compile(r"\s*[0-9]{1,9}\s*", re.ASCII)
_MAX_REASON_CHARS = 500
MAX_LISTED = 1024
"""Values of one list of a job; more than anybody has cards."""


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        path = user_path(value, "it")
    except UsageError as error:
        raise ValueError(str(error)) from error
    return str(path) if value.startswith("~") else value


PositiveInt = Annotated[int, Field(ge=1, le=MAX_SIZE), BeforeValidator(_whole_number)]
NumCores = Annotated[int, Field(ge=1, le=MAX_CORES), BeforeValidator(_whole_number)]
PathText = Annotated[str, BeforeValidator(_path)]


def as_tuple(value: Any) -> Any:
    """A single value stands for a list of one."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(values) > MAX_LISTED:
        raise ValueError(f"must hold at most {MAX_LISTED} values")
    return values


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A value that is written twice in a grid is one."""
    if not values:
        raise ValueError("must hold at least one value")
    return tuple(dict.fromkeys(values))


T = TypeVar("T")
Listed = Annotated[tuple[T, ...], BeforeValidator(as_tuple), AfterValidator(_once)]


def prompt_lens(value: int | str) -> tuple[int, ...]:
    """The prefill lengths of one program: `32`, or `32+128` for a program that has both.

    Raises:
        ValueError: where it is neither.
    """
    words = value.split("+") if isinstance(value, str) else [str(value)]
    if len(words) > MAX_LISTED or not all(map(_LENGTH.fullmatch, words)):
        raise ValueError("must be a number of tokens, or several like 32+128")
    lens = tuple(map(int, words))
    for length in lens:
        if length < 1 or length & (length - 1):
            raise ValueError(f"must be a power of two, not {length}")
    return lens


def _prompt_len(value: Any) -> Any:
    lens = prompt_lens(value)
    return lens[0] if len(lens) == 1 else "+".join(map(str, lens))


def _device_ids(value: Any) -> Any:
    ids = as_tuple(value)
    if ids == ("all",):
        return "all"
    if not all(type(i) is int and 0 <= i <= MAX_SIZE for i in ids):
        raise ValueError("must be 'all' or a list of device ids from 0")
    if len(set(ids)) != len(ids):
        raise ValueError("holds the same value twice")
    return _once(ids)


def _sampling(value: Any) -> Any:
    if not isinstance(value, dict):
        return SamplingParams() if value is None else value
    if {"max_tokens", "max_completion_tokens"} & value.keys():
        raise ValueError("max_tokens has another name in a job, run.generation_len: use that")
    try:
        return SamplingParams().updated(value)
    except RowError as error:
        raise ValueError(str(error)[:_MAX_REASON_CHARS].rstrip(".")) from error


def _sampling_fields(params: SamplingParams) -> dict[str, Any]:
    fields = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(params).items()}
    del fields["max_tokens"]
    return fields


Sampling = Annotated[
    InstanceOf[SamplingParams], BeforeValidator(_sampling), PlainSerializer(_sampling_fields)
]
Devices = Annotated[Literal["all"] | tuple[int, ...], BeforeValidator(_device_ids)]
PromptLen = Annotated[int | str, BeforeValidator(_prompt_len)]
Date = Annotated[str, AfterValidator(lambda text: datetime.fromisoformat(text).isoformat())]
