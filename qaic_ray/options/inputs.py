"""What is answered: prompts, the files that hold them, and which of their rows."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, WithJsonSchema

from qaic_ray import option_schemas as schemas
from qaic_ray.option_types import (
    Count,
    PositiveInt,
    PromptFormat,
    Section,
    as_path,
    as_tuple,
    opt,
)

PROMPTS = "Prompts"

_SHARD = re.compile(r"\s*([0-9]{1,6})\s*/\s*([0-9]{1,6})\s*", re.ASCII)
_SIZE = re.compile(r"\s*[0-9]{1,9}\s*", re.ASCII)


def _sources(value: Any) -> Any:
    """The parts of an input: one of them is a text, several are a list."""
    parts = as_tuple(value) if isinstance(value, list | tuple) else (value,)
    if not parts:
        raise ValueError("must name a file, a folder, a glob or a URI")
    if not all(isinstance(part, str) and part for part in parts):
        raise ValueError("must be a text, or a list of texts")
    paths = tuple(map(as_path, parts))
    return paths[0] if len(paths) == 1 else paths


def shard_of(text: str) -> tuple[int, int]:
    """K and N of `K/N`.

    Raises:
        ValueError: it is not that, or K is not from 1 to N.
    """
    found = _SHARD.fullmatch(text)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise ValueError("must be K/N with K from 1 to N, like 3/64, the third of 64 parts")
    return number, count


def _shard(value: Any) -> Any:
    number, count = shard_of(value if isinstance(value, str) else "")
    return f"{number}/{count}"


def sample_of(value: int | str) -> int | float:
    """How large a sample is: so many rows, or the share of `5%`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str) and value.strip().endswith("%"):
        with suppress(ValueError):
            share = float(value.strip().removesuffix("%")) / 100.0
            if 0 < share <= 1:
                return share
    elif _SIZE.fullmatch(str(value)) and int(value) > 0 and not isinstance(value, bool):
        return int(value)
    raise ValueError("must be a number of rows, or a share over 0 and up to 100%, like 5%")


def _sample(value: Any) -> Any:
    size = sample_of(value if isinstance(value, int | str) else "")
    return size if isinstance(size, int) else str(value).strip()


Sources = Annotated[
    str | tuple[str, ...], BeforeValidator(_sources), WithJsonSchema(schemas.SOURCES)
]
Shard = Annotated[str, BeforeValidator(_shard), WithJsonSchema(schemas.SHARD)]
SampleSize = Annotated[int | str, BeforeValidator(_sample), WithJsonSchema(schemas.SAMPLE)]


class PromptOptions(Section):
    """What is answered."""

    GROUP: ClassVar[str] = PROMPTS

    prompt: str | None = opt(
        None,
        r"Prompts separated by |, as in the recipe; \| is a pipe of the text.",
        sample="My name is|The capital of France is",
    )
    prompts: Sources | None = opt(
        None,
        "A file, a folder, a quoted glob or a URI (s3://, gs://, hdfs://), or several by several "
        "flags; .txt: a prompt a line; .jsonl, .csv, .parquet: prompt or messages; - for stdin.",
        example="'parts/*.jsonl.gz'",
        flag="--input",
        aliases=("--prompts-file",),
        short="-i",
        metavar="FILE",
        repeated=True,
        free=True,
    )
    prompts_format: PromptFormat | None = opt(
        None, "What the prompts file holds.", shown="by name and content"
    )
    shard: Shard | None = opt(
        None,
        "Answer the K-th of N parts of the input, counted from 1: whole files where there are as "
        "many, else rows. Merge joins the runs.",
        example="3/64",
        metavar="K/N",
        shown="all of it",
    )
    sample: SampleSize | None = opt(
        None,
        "Of that, answer so many rows, or that share, the same each time, in input order.",
        example="5%",
        metavar="N|N%",
        shown="every row",
    )
    sample_seed: Count = opt(0, "Another number gives another sample.", sample=7)
    max_prompts: PositiveInt | None = opt(
        None,
        "Of that, answer only the first so many, to try a run out.",
        flag="--limit",
        aliases=("--max-prompts",),
        shown="all",
        sample=10,
    )
