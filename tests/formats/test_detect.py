"""Nothing is guessed in silence: tables, arrays, encodings, packings, and files that are none."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.formats import lines
from qaic_ray.formats.prompts import prompts_from_file
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import Prompt, Row
from qaic_ray.sampling_params import SamplingParams

AB = [Prompt(0, "a"), Prompt(1, "b")]


@contextmanager
def stdin(data: bytes) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        yield


def both_ways(
    data: bytes,
    tmp_path: Path,
    name: str = "p",
    form: PromptFormat | None = None,
) -> list[Prompt | Row]:
    """The rows of a file, which must be those of the same as a stream."""
    path = tmp_path / name
    path.write_bytes(data)
    items = list(prompts_from_file(path, form))
    with stdin(data):
        piped = list(prompts_from_file("-", form))
    assert [type(item) for item in piped] == [type(item) for item in items]
    assert [i for i in piped if isinstance(i, Prompt)] == [
        i for i in items if isinstance(i, Prompt)
    ]
    return items


def errors(items: list[Prompt | Row]) -> list[str | None]:
    return [item.error if isinstance(item, Row) else None for item in items]


def refusal(data: bytes, tmp_path: Path, name: str = "p", form: PromptFormat | None = None) -> str:
    """The one sentence about a file, said before anything is read of it, and about the stream."""
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UsageError) as said:
        prompts_from_file(path, form)
    if name == "p":
        with stdin(data), pytest.raises(UsageError):
            list(prompts_from_file("-", form))
    assert len(str(said.value)) < 400
    return str(said.value)


# -- JSON, known by its content


@pytest.mark.parametrize(
    "data",
    [
        b'{"prompt": "a"}\n{"prompt": "b"}\n',
        b'{"prompt":"a"}\r\n{"prompt":"b"}',
        b'[{"prompt": "a"}, {"prompt": "b"}]',
        b'[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n',
        b'\n[\n  {\n    "prompt": "a"\n  },\n  {\n    "prompt": "b"\n  }\n]\n\n',
    ],
)
def test_rows_of_json_whatever_the_name(data: bytes, tmp_path: Path) -> None:
    for name in ("p", "p.json", "p.data"):
        assert both_ways(data, tmp_path, name) == AB


@pytest.mark.parametrize("first", [b"{bad json", b'{"prompt": "a"', b"{}x", b'{"prompt": 1}'])
def test_a_damaged_first_line_is_an_error_row_and_decides_nothing(
    first: bytes, tmp_path: Path
) -> None:
    data = first + b'\n{"prompt": "a"}\n{"prompt": "b"}\n'
    row, *others = both_ways(data, tmp_path)
    assert isinstance(row, Row)
    assert [item.text for item in others] == ["a", "b"]


@pytest.mark.parametrize("first", [b"", b"  ", b'"prompt": "x"}', b"oops"])
def test_of_a_file_what_follows_decides(first: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(first + b'\n{"prompt": "a"}\n')
    row, item = prompts_from_file(path)
    assert isinstance(row, Row)
    assert item == Prompt(1, "a")


def test_a_row_among_lines_of_a_stream_that_began_as_text_is_never_answered_as_text() -> None:
    with stdin(b'hello\n{"prompt": "a"}\n{"x": 1}\n'):
        first, row, last = prompts_from_file("-")
    assert (first, last) == (Prompt(0, "hello"), Prompt(2, '{"x": 1}'))
    assert isinstance(row, Row)
    assert "--prompts-format jsonl or text" in str(row.error)


@pytest.mark.parametrize(
    "text",
    [
        "hello", "[INST] hi [/INST]", "{name}, hello", "[1] see below", "{{ template }}", "prompt",
        "a, prompt and, more", "# heading", '"quoted"', "-1",
    ],
)  # fmt: skip
def test_prose_is_text(text: str, tmp_path: Path) -> None:
    data = f"{text}\nsecond line\n".encode()
    assert both_ways(data, tmp_path) == [Prompt(0, text), Prompt(1, "second line")]


def test_rows_without_a_prompt_are_error_rows(tmp_path: Path) -> None:
    items = both_ways(b'{"instruction": "Say hi."}\n{"instruction": "Bye."}\n', tmp_path)
    assert [str(error).partition(": ")[2] for error in errors(items)] == [
        'There is no "prompt" and no "messages" in it.'
    ] * 2


@pytest.mark.parametrize("name", ["p", "p.json", "p.jsonl"])
@pytest.mark.parametrize(
    "data",
    [
        b'{\n  "prompt": "a"\n}\n',
        b'{"prompt": "a",\n "id": 1}\n',
        b'{\n  "prompt": "a"\n}\n{\n  "prompt": "b"\n}\n',
        b"{\n" + b"".join(b'  "k%d": "%s",\n' % (i, b"x" * 90) for i in range(900)) + b'"z": 1}',
    ],
    ids=["one", "two lines", "two objects", "long"],
)
def test_an_object_over_several_lines_is_one_sentence(
    data: bytes, name: str, tmp_path: Path
) -> None:
    assert "a JSON object over several lines" in refusal(data, tmp_path, name)


def test_objects_without_line_ends_between_them_are_an_error_row(tmp_path: Path) -> None:
    (row,) = both_ways(b'{"prompt": "a"}{"prompt": "b"}\n', tmp_path)
    assert "Extra data" in str(row.error if isinstance(row, Row) else "")


# -- one array


def test_an_item_that_is_no_row_is_nobody_elses_error(tmp_path: Path) -> None:
    data = b'[{"prompt": "a"}, {bad}, 7, {"prompt": "]}\\\\\\"[,"}, , {"id": [[1, 2], {}]}]'
    first, *bad, fourth, empty, last = both_ways(data, tmp_path)
    assert first == Prompt(0, "a")
    assert fourth == Prompt(3, ']}\\"[,')
    assert [e and e.partition(": ")[0] for e in errors([*bad, empty, last])] == [
        f"p item {number}" for number in (2, 3, 5, 6)
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'[{"prompt": "a"}, {"prompt": "b"', r"past item 1: the JSON array does not end\."),
        (b'[{"prompt": "a"}, {"prompt": "b"}] x', r"past item 2: something stands behind the"),
        (b'[{"prompt": "a"}, {"prompt": "b"}]\n[]', r"past item 2: something stands behind"),
    ],
)
def test_an_array_that_is_damaged_ends_after_the_rows_before_it(
    data: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(data)
    read: list[Prompt | Row] = []
    with pytest.raises(QaicRayError, match=words):
        list(map(read.append, prompts_from_file(path)))
    assert read == AB[: len(read)]
    assert len(read) == (2 if data.count(b"]") else 1)


def test_an_empty_array_and_a_header_alone_say_so(tmp_path: Path) -> None:
    for name, data in (("p.json", b"[]"), ("p.csv", b"prompt,id\n"), ("p.tsv", b"prompt")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UsageError, match=rf"There are no prompts in {name}"):
            list(prompts_from_file(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": st.text("[]{},\"\\a\n東", min_size=1)},
                                        optional={"mine": JSON}), min_size=1, max_size=5),
    indent=st.none() | st.integers(0, 4),
    piece=st.integers(1, 20),
)  # fmt: skip
def test_any_array_in_any_pieces(
    rows: list[dict[str, object]], indent: int | None, piece: int
) -> None:
    class Pieces(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            return super().read1(piece)

    data = json.dumps(rows, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(Pieces(data)))
        items = list(prompts_from_file("-"))
    assert [item.text for item in items] == [row["prompt"] for row in rows]


def test_an_item_that_is_too_long_is_an_error_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 2**20)
    long = json.dumps({"prompt": "x" * 2**21}).encode()
    data = b'[{"prompt": "a"},' + long + b',{"prompt": "b"}]'
    first, row, last = both_ways(data, tmp_path)
    assert (first, last) == (Prompt(0, "a"), Prompt(2, "b"))
    assert "longer than 1 MiB" in str(errors([row])[0])


# -- tables of texts


def test_a_csv_file_has_a_header_quotes_and_fields(tmp_path: Path) -> None:
    data = (
        b"\xef\xbb\xbfid, prompt ,label,max_tokens,stop,ignore_eos,n_predict\r\n"
        b'1,"My name, is ""x""",2,5,;,True,\r\n'
        b"\r\n"
        b'007,"two\nlines\r\n",,,"[""x"", ""y""]",false,4\r\n'
        b"3,,,,,,\r\n"
        b"4,a\r\n"
        b'5,"a"b,,,,,\r\n'
        b"6,caf\xe9,,,,,\r\n"
        b"7,b,\xe9,nan,,,\r\n"
    )
    first, second, *bad, last = both_ways(data, tmp_path, "p.csv", PromptFormat.CSV)
    assert first == Prompt(
        0,
        'My name, is "x"',
        "1",
        sampling=SamplingParams(max_tokens=5, stop=(";",), ignore_eos=True),
    )
    assert second == Prompt(
        1, "two\nlines\r\n", "007", sampling=SamplingParams(max_tokens=4, stop=("x", "y"))
    )
    assert last == Prompt(6, "b", "7")
    assert errors(bad) == [
        "p.csv line 7: The prompt is empty.",
        "p.csv line 8: It has 2 cells, and the header has 7: put quotes around a cell that holds "
        "','.",
        "p.csv line 9: Not CSV: ',' expected after '\"'.",
        'p.csv line 10: Not UTF-8: the column "prompt".',
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.csv", b"label,prompt\n1,a\n2,b\n"),
        ("p.CSV.gz", gzip.compress(b"prompt\na\nb\n", mtime=0)),
        ("p.csv", b"label;prompt\n1;a\n2;b\n"),
        ("p.tsv", b"prompt\tlabel\na\t1\nb\t2\n"),
        ("p", b"prompt,label\na,1\nb,2\n"),
        ("p", b"label\tprompt\n1\ta\n2\tb\n"),
    ],
)
def test_a_table_is_known_by_its_name_or_its_header(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert list(prompts_from_file(path)) == AB


def test_a_cell_of_messages_is_json(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,messages\n,"[{""role"": ""user"", ""content"": ""a""}]"\nb,\n')
    first, second = prompts_from_file(path)
    assert first == Prompt(0, "a", messages=({"role": "user", "content": "a"},))
    assert second == Prompt(1, "b")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("question,answer", 'no column "prompt" and no "messages": its columns are question, answ'),
        ("prompt,prompt", 'several columns "prompt"'),
        ("prompt,temprature", 'write "temperature"'),
        ("a\rb,prompt", "the first line, which names the columns, is damaged"),
        ("caf\udce9,temperature\udce9", r"columns are 'caf\udce9', 'temperature\udce9'"),
        (",".join(f"column {i} {'x' * 100}" for i in range(5000)), "no column"),
    ],
)
def test_a_header_that_names_no_prompts_is_one_sentence(
    header: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.csv"
    text = header + "\n" + "x," * header.count(",") + "x\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as said:
        list(prompts_from_file(path))
    assert words in str(said.value)
    assert len(str(said.value)) < 1000


def test_a_cell_that_is_not_closed_ends_after_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt\na\nb\n"c\n' + "d\n" * 1000)
    read: list[Prompt | Row] = []
    with pytest.raises(QaicRayError, match="a cell that begins in line 4 is not closed"):
        list(map(read.append, prompts_from_file(path)))
    assert read == AB


# -- encodings

CODECS = ["utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "packed"])
def test_an_encoding_is_known_by_its_mark(
    codec: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    for text in ("a\nb\n", '{"prompt": "a"}\r\n{"prompt": "b"}', "prompt,id\na,\nb,\n"):
        assert both_ways(pack(text.encode(codec)), tmp_path) == AB
    long = ["東京 \U0001f408" * 50_000, "\u0a0d\u0d0a", "b"]
    items = both_ways(pack("\n".join(long).encode(codec)), tmp_path)
    assert [item.text for item in items if isinstance(item, Prompt)] == long


@pytest.mark.parametrize("codec", ["utf-16-be", "utf-16-le", "utf-32-be", "utf-32-le"])
def test_both_orders_of_bytes(codec: str, tmp_path: Path) -> None:
    assert both_ways("\ufeffa\nb".encode(codec), tmp_path) == AB


def test_half_a_pair_is_its_lines_error_and_a_cut_file_ends_in_a_sentence(tmp_path: Path) -> None:
    first, row, last = both_ways(b"\xff\xfe" + "a\n".encode("utf-16-le") + b"\x00\xd8\n\x00b\x00",
                                 tmp_path)  # fmt: skip
    assert (first, last) == (Prompt(0, "a"), Prompt(2, "b"))
    assert "Not UTF-8" in str(errors([row])[0])
    path = tmp_path / "cut"
    path.write_bytes("a\nb\nc".encode("utf-16")[:-1])
    with pytest.raises(QaicRayError, match="cut cannot be read"):
        list(prompts_from_file(path))


def test_utf16_without_a_mark_and_binaries_are_one_sentence(tmp_path: Path) -> None:
    for name in ("p", "p.txt", "p.csv"):
        for data in ("a\nb".encode("utf-16-le"), b"\x7fELF\x02\x01\x01\0\0\0", b"\0" * 9):
            assert "NUL bytes" in refusal(data, tmp_path, name)


def test_latin_1_is_an_error_row_that_names_the_byte(tmp_path: Path) -> None:
    row, item = both_ways("café\nb\n".encode("latin-1"), tmp_path)
    assert errors([row]) == ["p line 1: Not UTF-8: byte 4 is 0xe9."]
    assert item == Prompt(1, "b")


def test_lines_of_an_old_mac_are_one_sentence(tmp_path: Path) -> None:
    for data in (b"a\rb\rc", b"a\rb\r", b'{"prompt": "a"}\r{"prompt": "b"}\r'):
        assert r"end in \r alone" in refusal(data, tmp_path)
    assert r"end in \r alone" in refusal(b"prompt,id\ra,1\r", tmp_path, "p.csv")
    assert both_ways(b"a\r\nb\r\n", tmp_path) == AB


# -- packings


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return packed


SKIPPED = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"
PACKERS = [gzip.compress, zstd, bz2.compress, lzma.compress]


@pytest.mark.parametrize("pack", PACKERS)
def test_all_that_a_packing_allows_is_read(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    lines = [f"line {i} {zlib.crc32(b'%d' % i)}" for i in range(20_000)]
    expected = [Prompt(i, line) for i, line in enumerate(lines)]
    cuts = sorted(random.Random(0).sample(range(20_000), 5))
    pieces = [lines[i:j] for i, j in zip([0, *cuts], [*cuts, 20_000], strict=True)]
    packed = [pack("".join(f"{line}\n" for line in piece).encode()) for piece in pieces]
    between = {gzip.compress: b"\0\0", zstd: SKIPPED, lzma.compress: b"\0" * 8}.get(pack, b"")
    data = (SKIPPED if pack is zstd else b"") + between.join([*packed, pack(b"")])
    assert both_ways(data, tmp_path, "p.txt") == expected


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("harm", ["cut", "more", "overwritten"])
def test_damage_ends_with_the_last_good_line_named(
    pack: Callable[[bytes], bytes], harm: str, tmp_path: Path
) -> None:
    lines = [f"line {i} {zlib.crc32(b'%d' % i)}" for i in range(20_000)]
    whole = pack("\n".join(lines).encode())
    data = {
        "cut": whole[: len(whole) // 2],
        "more": whole + b"not packed",
        "overwritten": whole[: len(whole) // 2] + bytes(100) + whole[len(whole) // 2 + 100 :],
    }[harm]
    path = tmp_path / "p.packed"
    path.write_bytes(data)
    read: list[Prompt | Row] = []
    with pytest.raises(QaicRayError, match=r"cannot be read( past line \d+)?: .+[^.]\.$") as said:
        list(map(read.append, prompts_from_file(path)))
    expected = [Prompt(i, line) for i, line in enumerate(lines)][: len(read)]
    # Damage that decompresses is told by the checksum at the end; what is a line may be cut.
    assert read[: len(expected) - 1] == expected[:-1] or harm == "overwritten"
    if read:
        assert f"past line {len(read)}" in str(said.value)
    if harm == "more":
        assert len(read) > 19_000


@pytest.mark.parametrize(
    ("magic", "words"),
    [
        (b"PK\x03\x04\x14\0", "a zip archive or a spreadsheet"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"\x04\x22\x4d\x18\x64\x40", "lz4"),
        (b"ARROW1\0\0", "Arrow"),
        (gzip.compress(b"PK\x03\x04\x14\0", mtime=0), "zip"),
        (gzip.compress(b"PAR1" + bytes(50), mtime=0), "parquet"),
    ],
)
def test_what_cannot_be_unpacked_is_named(magic: bytes, words: str, tmp_path: Path) -> None:
    assert words in refusal(magic, tmp_path, "p.jsonl")


@pytest.mark.parametrize("pack", [None, "gzip", "bz2", "utf-16", "csv", "array"])
def test_a_prompt_is_there_as_soon_as_its_line_is(
    pack: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read ahead that has not come: a row is heard before the next one is typed."""
    codec = zlib.compressobj(wbits=31)
    packed: dict[str | None, Callable[[str], bytes]] = {
        "gzip": lambda text: codec.compress(text.encode()) + codec.flush(zlib.Z_SYNC_FLUSH),
        "bz2": lambda text: bz2.compress(text.encode()),
        "utf-16": lambda text: text.encode("utf-16" if "aaa" in text else "utf-16-le"),
    }
    lines = [("" if pack != "csv" else "prompt,id\n") + "aaa" + ("," if pack == "csv" else "")]
    lines += [f"{text}{',' if pack == 'csv' else ''}" for text in ("bbb", "ccc")]
    if pack == "array":
        lines = ['[{"prompt": "aaa"},', '{"prompt": "bbb"},', '{"prompt": "ccc"},']
    reading, writing = os.pipe()
    with open(reading, "rb") as terminal, open(writing, "wb", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(terminal))
        prompts = prompts_from_file("-")
        for index, line in enumerate(lines):
            keyboard.write(packed.get(pack, str.encode)(line + "\n"))
            assert next(prompts) == Prompt(index, ("aaa", "bbb", "ccc")[index])


@pytest.mark.parametrize("start", [b"a\n", b'[{"prompt": "a"},"'], ids=["line", "item"])
def test_a_row_without_end_ends_the_reading(
    start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 2**20)
    monkeypatch.setattr(lines, "MAX_SKIPPED_BYTES", 2**21)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(start + b"x" * 2**23, mtime=0))
    read: list[Prompt | Row] = []
    with pytest.raises(QaicRayError, match=r"past (line|item) 1: a row is longer than"):
        list(map(read.append, prompts_from_file(path)))
    assert read == AB[:1]


ROWS = [{"prompt": "東京 a", "id": i, "mine": [1, {"y": "]"}]} for i in range(20)]
WHOLE = [
    "\n".join(map(json.dumps, ROWS)).encode(),
    json.dumps(ROWS, indent=2).encode(),
    b"prompt,id\n" + b"".join(b'"a ""q"", b",%d\n' % i for i in range(20)),
    "a\nb\n東".encode("utf-16"),
]


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_rows_or_one_sentence(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    ways = {"read": 0, "refused": 0}
    for _ in range(150):
        data = bytearray(chance.choice([bytes, *PACKERS])(chance.choice(WHOLE)))
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(data) + 1)
            new = chance.choice([b"\0", b'"', b"[", b"}", b"\n", b"\r", b"\xff\xfe", b"PAR1", b""])
            data[at : at + chance.randrange(1, 30) * (not new)] = new
        path = tmp_path / chance.choice(["p", "p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv.gz"])
        path.write_bytes(data)
        try:
            items = list(prompts_from_file(path, chance.choice([None, None, *PromptFormat])))
        except QaicRayError as error:
            ways["refused"] += 1
            sentence = str(error)
            assert len(sentence) < 1000, sentence
            assert "\n" not in sentence
            continue
        ways["read"] += 1
        assert [item.index for item in items] == list(range(len(items)))
        for error_text in filter(None, errors(items)):
            assert len(error_text) < 1000
            assert "a fault of qaic-ray's" not in error_text
    assert min(ways.values()) > 20
