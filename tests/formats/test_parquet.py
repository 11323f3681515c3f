"""Parquet: prompts from a table's columns, a run's rows as a table."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.formats import tables
from qaic_ray.formats.prompts import prompts_from_file
from qaic_ray.formats.tables import row_schema, write_parquet
from qaic_ray.option_types import OutputFormat, PromptFormat
from qaic_ray.rows import ErrorClass, FinishReason, Prompt, Row, Sample
from qaic_ray.runs.delivery import RowWriter, export_outputs
from qaic_ray.sampling_params import SamplingParams, TokenLogprob

MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "東京?"})


def table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


# -- in


def test_columns_are_the_fields_of_a_row(tmp_path: Path) -> None:
    path = table(
        tmp_path / "p.parquet",
        {
            "prompt": ["a", None, "c"],
            "messages": pa.array([None, MESSAGES, None]),
            "id": [1, 2, None],
            "max_tokens": [5.0, None, None],
            "stop": [["x"], None, []],
            "mine": [b"\xff", None, b""],
        },
    )
    assert list(prompts_from_file(path, sampling=SamplingParams(top_k=3))) == [
        Prompt(0, "a", "1", sampling=SamplingParams(top_k=3, max_tokens=5, stop=("x",))),
        Prompt(1, "東京?", "2", MESSAGES),
        Prompt(2, "c", sampling=SamplingParams(top_k=3)),
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_texts_of_every_kind_and_every_row_group(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"prompt {index}" for index in range(1000)]
    path = table(tmp_path / "p", {"prompt": pa.array(texts, kind)}, row_group_size=300)
    assert list(prompts_from_file(path)) == [Prompt(i, text) for i, text in enumerate(texts)]


def test_repeated_texts_are_read_from_their_dictionary(tmp_path: Path) -> None:
    path = table(tmp_path / "p", {"prompt": pa.array(["a", "b", "a"]).dictionary_encode()})
    assert list(prompts_from_file(path)) == [Prompt(0, "a"), Prompt(1, "b"), Prompt(2, "a")]


@pytest.mark.parametrize(
    ("column", "values", "error"),
    [
        ("prompt", [None], '"prompt" is null, not a string.'),
        ("prompt", [""], "The prompt is empty."),
        ("id", [1.5], '"id" is a number, not a string or a whole number.'),
        ("id", [b"x"], '"id" is a bytes, not a string or a whole number.'),
        ("id", [datetime.date(2024, 1, 1)], '"id" is a date, not a string or a whole number.'),
        ("max_tokens", [1.5], "max_tokens is 1.5; allowed is a whole number"),
        ("temperature", ["1"], "temperature is '1'; allowed is a number"),
        ("seed", [float("nan")], "seed is nan; allowed is a whole number"),
    ],
)
def test_a_malformed_row_is_an_error_row_with_its_index(
    tmp_path: Path, column: str, values: list[Any], error: str
) -> None:
    columns = {"prompt": ["a", "b", "c"], column: [None, *values, None]}
    if column == "prompt":
        columns["prompt"] = ["a", *values, "c"]
    first, row, last = prompts_from_file(table(tmp_path / "p.parquet", columns))
    assert (first, last) == (Prompt(0, "a"), Prompt(2, "c"))
    assert isinstance(row, Row)
    assert row.index == 1
    assert str(row.error).startswith(f"p.parquet row index 1: {error}")


def test_a_text_that_is_not_utf8_stops_no_other(tmp_path: Path) -> None:
    prompts = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.string())
    first, row, last = prompts_from_file(table(tmp_path / "p", {"prompt": prompts}))
    assert (first, last) == (Prompt(0, "a"), Prompt(2, "c"))
    assert isinstance(row, Row)
    assert row.error == "p row index 1: Not UTF-8."


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"text": ["a"]}, 'no column "prompt" and no "messages": its columns are text'),
        ({"prompt": [1]}, 'the column "prompt" is of int64, not of texts'),
        ({"messages": ["a"]}, 'the column "messages" is of string, not of lists of structs'),
        ({"prompt": ["a"], "temprature": [1]}, 'Unknown sampling field "temprature"'),
    ],
)
def test_columns_that_no_row_could_be_answered_with_are_said_at_once(
    tmp_path: Path, columns: dict[str, Any], error: str
) -> None:
    with pytest.raises(UsageError, match=error):
        prompts_from_file(table(tmp_path / "p.parquet", columns))


def test_what_is_no_parquet_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    for content in (b"", b"a prompt\n", b"PAR1" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="is no parquet file that can be read"):
            prompts_from_file(path)
    path = tmp_path / "p.txt"
    path.write_bytes(b"a")
    with pytest.raises(UsageError, match="is no parquet file that can be read"):
        prompts_from_file(path, PromptFormat.PARQUET)


def test_damage_ends_with_one_sentence_after_the_rows_before_it(tmp_path: Path) -> None:
    texts = [f"prompt {index}" for index in range(3000)]
    path = table(tmp_path / "p.parquet", {"prompt": texts}, row_group_size=1000)
    content = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    read: list[Prompt | Row] = []
    items = map(read.append, prompts_from_file(path))
    with pytest.raises(QaicRayError, match=r"cannot be read past row index \d+: .+[^.]\.$"):
        list(items)
    assert read == [Prompt(index, text) for index, text in enumerate(texts[: len(read)])]
    assert len(read) > 1500


# -- out

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
IDS = st.integers(0, 2**31 - 1)
ENDING = {"finish_reason": st.sampled_from(FinishReason), "stop_reason": st.none() | IDS | TEXTS}
LOGPROBS = st.builds(
    TokenLogprob, IDS, st.floats(-50, 0), st.lists(st.tuples(IDS, st.floats(-50, 0))).map(tuple)
)
ANSWER = {
    **ENDING,
    "text": TEXTS,
    "token_ids": st.lists(IDS, max_size=4).map(tuple),
    "logprobs": st.none() | st.lists(LOGPROBS, max_size=2).map(tuple),
}
ROWS = st.builds(
    Row,
    index=st.integers(0, 2**40),
    prompt=TEXTS,
    id=st.none() | TEXTS,
    messages=st.none() | st.just(MESSAGES),
    prompt_tokens=IDS,
    ttft_s=st.floats(0, 1e6),
    decode_s=st.floats(0, 1e6),
    queue_s=st.none() | st.floats(0, 1e6),
    started_at=st.none() | st.floats(0, 4e9),
    ended_at=st.none() | st.floats(0, 4e9),
    worker=TEXTS,
    attempts=st.integers(0, 4),
    choices=st.lists(st.builds(Sample, **ANSWER), max_size=2).map(tuple),
    error=st.none() | TEXTS,
    error_class=st.none() | st.sampled_from(ErrorClass),
    **ANSWER,
)


def without_nulls(value: Any) -> Any:
    """A row of the table as the JSON has it."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    row = {key: without_nulls(item) for key, item in value.items() if item is not None}
    if "stop_reason_token" in row:
        row["stop_reason"] = row.pop("stop_reason_token")
    return row


@given(st.lists(ROWS, max_size=3))
def test_any_row_comes_back_from_the_table(rows: list[Row]) -> None:
    documents = [row.to_json() for row in rows]
    stream = pa.BufferOutputStream()
    write_parquet(documents, stream)
    back = pq.read_table(pa.BufferReader(stream.getvalue()))
    assert back.schema.equals(row_schema())
    assert without_nulls(back.to_pylist()) == [without_nulls(row) for row in documents]


def test_every_key_of_a_row_has_its_column() -> None:
    top = TokenLogprob(1, -0.5, ((2, -1.0),))
    sample = Sample("a", (1,), FinishReason.STOP, stop_reason=".", logprobs=(top,))
    row = Row(
        index=0,
        prompt="p",
        text="a",
        finish_reason=FinishReason.STOP,
        messages=MESSAGES,
        stop_reason=".",
        queue_s=0.0,
        started_at=0.0,
        ended_at=0.0,
        logprobs=(top,),
        prompt_logprobs=(None, top),
        reused_tokens=1,
        choices=(sample,),
        error="e",
        error_class=ErrorClass.DEVICE,
    )
    document = row.to_json()
    schema = row_schema()
    columns = [name for name in schema.names if name != "stop_reason_token"]
    assert columns == list(document)
    choice = {field.name for field in schema.field("choices").type.value_type} - {
        "stop_reason_token"
    }
    assert choice == set(document["choices"][0])


def test_a_runs_rows_are_a_table_and_that_can_be_a_prompts_file(tmp_path: Path) -> None:
    with RowWriter(tmp_path) as write:
        write(Row(0, "a", "b", FinishReason.STOP, token_ids=(1, 2)))
        write(Row.failed(Prompt(1, "東京?", "x"), "It is too long."))
    (path,) = export_outputs(tmp_path, OutputFormat.PARQUET, model="m")
    first, second = pq.read_table(path).to_pylist()
    assert (first["text"], first["token_ids"], first["error"]) == ("b", [1, 2], None)
    assert (second["finish_reason"], second["error"]) == ("error", "It is too long.")
    assert list(prompts_from_file(path)) == [Prompt(0, "a"), Prompt(1, "東京?", "x")]


def test_many_rows_are_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_GROUP_ROWS", 1024)
    row = Row(index=0, prompt="a", text="b", finish_reason=FinishReason.STOP).to_json()
    with (tmp_path / "t").open("wb") as stream:
        write_parquet(({**row, "index": index} for index in range(2500)), stream)
    back = pq.ParquetFile(tmp_path / "t")
    assert back.metadata.num_row_groups == 3
    assert back.read(["index"]).to_pydict()["index"] == list(range(2500))
