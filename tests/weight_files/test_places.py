"""Reading where weights lie: the files that compilers would take, and odd documents in a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from fuzzing import changed_bytes, counts, put_through
from mutations import documents, texts

from qaic_ray.errors import CheckpointError, UsageError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.weight_files import content
from qaic_ray.weight_files.content import DIGESTS_FOLDER, pointed_at
from qaic_ray.weight_files.spec import ROOT_VARIABLE, read_places
from qaic_ray.weight_files.tensors import read_entries


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def save(folder: Path, add: float = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.arange(6, dtype=np.float32) + add for name in ("a", "b")}
    safetensors.numpy.save_file(tensors, folder / "m.safetensors")


def spec(folder: Path) -> dict[str, Any]:
    return {
        "version": 5,
        "model_id": str(folder),
        "files": [{"path": f"{folder.name}/m.safetensors", "format": "safetensors"}],
        "inputs": [{"name": n, "location": {"file": 0, "key": n}} for n in "ab"],
    }


def test_files_are_looked_for_in_the_order_of_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("variable", "root", "beside", "own"):
        save(tmp_path / name / "c")
    document = spec(tmp_path / "own" / "c") | {"external_data_root": str(tmp_path / "root")}
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "variable"))
    found = []
    for name in ("variable", "root", "beside", "own"):
        places = read_places(json.dumps(document), "m.onnx", tmp_path / "beside")
        found.append(places["a"].path.parents[1].name)
        (tmp_path / name / "c" / "m.safetensors").unlink()
    assert found == ["variable", "root", "beside", "own"]
    with pytest.raises(UsageError, match="The weights are not where the model points"):
        read_places(json.dumps(document), "m.onnx", tmp_path / "beside")


def test_the_digest_is_of_the_bytes_and_is_kept_while_a_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "c")
    places = read_places(json.dumps(spec(tmp_path / "c")), "m.onnx", tmp_path)
    first = pointed_at(places)
    assert (first.dtypes, first.change()) == (("F32",), "")
    num_read = []
    read = content.read_into
    monkeypatch.setattr(content, "read_into", lambda *given: (num_read.append(1), read(*given)))
    assert pointed_at(places) == first
    assert num_read == []
    path = tmp_path / "c" / "m.safetensors"
    os.utime(path)
    touched = pointed_at(places)
    assert touched.sha256 == first.sha256
    assert len(num_read) == 2
    assert "have changed since" in first.change()
    save(tmp_path / "c", add=1)
    assert pointed_at(places).sha256 != first.sha256
    (note,) = (tmp_path / "cache" / DIGESTS_FOLDER).iterdir()
    note.write_text('{"status": 3}')
    assert pointed_at(places).sha256 != first.sha256
    path.unlink()
    assert "cannot be read" in touched.change()
    with pytest.raises(UsageError, match=r"Cannot read .*m\.safetensors"):
        pointed_at(places)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c" / "m.safetensors"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UsageError, match=r"m\.safetensors is not a file"):
        read_places(json.dumps(spec(tmp_path / "c")), "m.onnx", tmp_path)


def of_json(good: Any, seed: int, number: int) -> Iterator[str]:
    """So many odd documents, as values and as damaged texts."""
    yield from map(json.dumps, documents(good, seed, number // 2))
    for data in texts(json.dumps(good), seed, number // 2):
        yield data.decode("utf-8", "replace")


@pytest.mark.parametrize("number", counts())
def test_odd_documents_are_read_or_refused_in_a_line(tmp_path: Path, number: int) -> None:
    save(tmp_path / "c")
    good = spec(tmp_path / "c") | {"external_data_root": str(tmp_path), "checkpoint_files": []}
    found = put_through(
        "places of weights",
        of_json(good, number, number),
        lambda text: read_places(text, "m.onnx", tmp_path),
        (UsageError,),
    )
    assert sum(found) == number
    assert 0 < found.read < number


@pytest.mark.parametrize("number", counts())
def test_odd_headers_are_read_or_refused_in_a_line(tmp_path: Path, number: int) -> None:
    """What is read lies inside of the file, behind the header."""
    path = tmp_path / "model.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    }
    good = len(json.dumps(header)).to_bytes(8, "little") + json.dumps(header).encode() + bytes(34)

    def files() -> Iterator[bytes]:
        yield from changed_bytes(good, number, number // 2)
        for text in of_json(header, number, number - number // 2):
            data = text.encode("utf-8", "surrogatepass")
            yield len(data).to_bytes(8, "little") + data + bytes(34)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for entry in read_entries([path]).values():
            assert 8 <= entry.offset <= entry.offset + entry.num_bytes <= len(data)

    found = put_through("safetensors headers", files(), read, (CheckpointError,))
    assert sum(found) == number
    assert 0 < found.read < number
