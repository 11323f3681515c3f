"""Prompt files in S3: moto's server, boto3 as the one who puts them there."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from input_files import KINDS, content
from s3_here import BUCKET, objects, s3_server, set_environment

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.formats.frozen_file import InputChanged
from qaic_ray.formats.inputs import filesystems
from qaic_ray.formats.inputs.choice import RowChoice
from qaic_ray.formats.inputs.many_files import ManyFiles
from qaic_ray.formats.inputs.named_files import named_files
from qaic_ray.formats.prompts import GREEDY
from qaic_ray.formats.row_reader import DEFAULT_CHAT

URI = f"s3://{BUCKET}/in"
ALL = RowChoice()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(autouse=True)
def there(server: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nine files below in/, one of each kind and some more; their texts."""
    set_environment(monkeypatch, server)
    client, texts = objects(), []
    for key in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=key["Key"])
    for at, kind in enumerate([*KINDS, "jsonl", "parquet"]):
        some = [f"file {at} row {row} – ü" for row in range(5)]
        put(f"in/d{at % 2}/part-{at}.{kind}", content(kind, some))
        texts.append((f"d{at % 2}/part-{at}.{kind}", some))
    put("in/_SUCCESS", b"")
    put("in/d0/read me.md", b"# Files")
    return [text for _, some in sorted(texts) for text in some]


def put(key: str, data: bytes) -> None:
    objects().put_object(Bucket=BUCKET, Key=key, Body=data)


def opened(uri: str = URI, choice: RowChoice = ALL, before: Any = None) -> ManyFiles:
    return ManyFiles(named_files(uri), None, choice, before)


def read(files: ManyFiles) -> list[str]:
    return [getattr(item, "text", "") for item in files.prompts(GREEDY, DEFAULT_CHAT)]


def test_a_folder_in_a_bucket_is_read_in_order(there: list[str]) -> None:
    assert read(opened()) == there
    assert read(opened(f"{URI}/")) == there
    shards = [read(opened(choice=RowChoice((k, 3)))) for k in (1, 2, 3)]
    assert [text for shard in shards for text in shard] == there


def test_a_glob_and_a_file_in_a_bucket(there: list[str]) -> None:
    put("in/one/a file, with %20.txt", b"alone\n")
    assert read(opened(f"{URI}/one/a file, with %20.txt")) == ["alone"]
    first = [text for text in there if text.startswith("file 6") or text.startswith("file 0")]
    assert read(opened(f"{URI}/d*/*.jsonl")) == first
    assert read(opened(f"{URI}/**/*.jsonl")) == first
    names = [file.name for file in named_files(f"{URI}/d[1]/part-*.csv")]
    assert names == ["d1/part-3.csv"]


def test_the_endpoint_may_stand_in_the_uri(
    server: str, there: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = server.removeprefix("http://")
    uri = f"{URI}?endpoint_override={host}&scheme=http&region=us-east-1"
    assert read(opened(uri)) == there
    paths = {file.path for file in named_files(uri)}
    assert f"{URI}/d0/part-0.jsonl?endpoint_override={host}&scheme=http&region=us-east-1" in paths


def test_a_shard_reads_its_own_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = filesystems.RemoteFile.open

    def noted(file: filesystems.RemoteFile) -> Any:
        asked.append(file.path.rpartition("/")[2])
        return real(file)

    monkeypatch.setattr(filesystems.RemoteFile, "open", noted)
    files = opened(choice=RowChoice((2, 4)))
    mine = set(asked)
    texts = read(files)
    assert mine < set(asked)
    assert len(set(asked)) == len({text.partition(" row")[0] for text in texts}) == 2


def test_little_is_read_of_a_large_parquet_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import pyarrow
    from pyarrow import parquet

    texts = [f"{row} {'x' * 997}{row:03}" for row in range(4000)]
    sink = io.BytesIO()
    table = pyarrow.table({"prompt": texts})
    parquet.write_table(table, sink, row_group_size=200, compression="none", use_dictionary=False)
    put("large/p.parquet", sink.getvalue())
    num_bytes = 0
    real = filesystems._RemoteReader.read_block

    def counted(reader: Any, number: int) -> bytes:
        nonlocal num_bytes
        block = real(reader, number)
        num_bytes += len(block)
        return block

    monkeypatch.setattr(filesystems, "READ_BYTES", 2**16)
    monkeypatch.setattr(filesystems, "KEPT_BLOCKS", 20)
    monkeypatch.setattr(filesystems._RemoteReader, "read_block", counted)
    assert read(opened(f"s3://{BUCKET}/large", RowChoice((7, 10)))) == texts[2400:2800]
    assert num_bytes < len(sink.getvalue()) / 3  # three readings of the footer are in it


def test_a_file_is_read_once_in_large_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little is asked for at a time."""
    lines = b"".join(b"%d %s\n" % (row, b"y" * 90) for row in range(5000))
    put("lines/p.txt", lines)
    put("packed/p.txt.gz", gzip.compress(lines, 0))
    asked: list[tuple[str, int]] = []
    real = filesystems._RemoteReader.read_block

    def noted(reader: Any, number: int) -> bytes:
        asked.append((reader._file.path, number))
        return real(reader, number)

    monkeypatch.setattr(filesystems, "READ_BYTES", 2**17)
    monkeypatch.setattr(filesystems._RemoteReader, "read_block", noted)
    for folder in ("lines", "packed"):
        files = opened(f"s3://{BUCKET}/{folder}")
        asked.clear()
        assert len(read(files)) == 5000
        numbers = [number for _, number in asked if number]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 3


def test_a_file_is_known_by_its_size_and_time() -> None:
    files = opened().source["files"]
    head = objects().head_object(Bucket=BUCKET, Key="in/d0/part-0.jsonl")
    assert files[0] == {
        "name": "d0/part-0.jsonl",
        "bytes": head["ContentLength"],
        "mtime_ns": int(head["LastModified"].timestamp() * 1e9),
    }


def test_a_run_goes_on_with_the_files_that_it_began_with(there: list[str]) -> None:
    before = json.loads(json.dumps(opened().source))
    put("in/d0/part-00.jsonl", b'{"prompt": "later"}\n')
    assert read(opened(before=before)) == there
    put("in/d0/part-0.jsonl", b'{"prompt": "another"}\n')
    with pytest.raises(UsageError, match=r"part-0\.jsonl has changed since the run began"):
        opened(before=before)
    objects().delete_object(Bucket=BUCKET, Key="in/d0/part-0.jsonl")
    with pytest.raises(UsageError, match=r"no d0/part-0\.jsonl any more"):
        opened(before=before)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_changes_ends_the_input_there(kind: str) -> None:
    files = opened(f"{URI}/d*/*.{kind}")
    items = files.prompts(GREEDY, DEFAULT_CHAT)
    found = [next(items).index for _ in range(5)]
    put(named_files(f"{URI}/d*/*.{kind}")[1].path.removeprefix(f"s3://{BUCKET}/"), b"other\n")
    with pytest.raises(InputChanged, match="has changed since the run began"):
        found += [item.index for item in items]
    assert found == list(range(5))
    items = opened(f"{URI}/d1/*").prompts(GREEDY, DEFAULT_CHAT)
    next(items)
    for name in named_files(f"{URI}/d1"):
        objects().delete_object(Bucket=BUCKET, Key=name.path.removeprefix(f"s3://{BUCKET}/"))
    with pytest.raises(QaicRayError, match="is gone since the run began"):
        list(items)


def test_what_a_bucket_does_not_have_is_one_sentence() -> None:
    for uri, words in [
        (f"s3://{BUCKET}/none", "There is nothing at"),
        (f"s3://{BUCKET}/in/*.xml", "No file matches"),
        ("s3://no-such-bucket/x", "There is nothing at"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            named_files(uri)
        assert "\n" not in str(caught.value)


@pytest.mark.slow  # its client tries again for seconds
def test_a_server_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="cannot be reached: ") as caught:
        named_files(URI)
    assert "\n" not in str(caught.value)


def test_remote_files_and_those_here_are_one_input(tmp_path: Path, there: list[str]) -> None:
    (tmp_path / "p.txt").write_text("first\nsecond\n")
    given = [str(tmp_path / "p.txt"), URI, str(tmp_path)]
    with pytest.raises(UsageError, match="named twice"):
        named_files(given)
    assert read(ManyFiles(named_files(given[:2]), None, ALL)) == ["first", "second", *there]
