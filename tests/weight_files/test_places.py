"""Reading where weights lie: the files that compilers would take, and odd documents in a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from mutations import documents, texts

from qaic_ray.errors import UsageError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.weight_files import content
from qaic_ray.weight_files.content import DIGESTS_FOLDER, pointed_at
from qaic_ray.weight_files.spec import ROOT_VARIABLE, read_places


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


def fuzz(folder: Path, seed: int, number: int) -> int:
    """So many odd documents; how many of them were read."""
    save(folder / "c")
    good = spec(folder / "c") | {"external_data_root": str(folder), "checkpoint_files": []}
    said, num_read = [], 0
    odd = [json.dumps(value) for value in documents(good, seed, number // 2)]
    odd += [t.decode("utf-8", "replace") for t in texts(json.dumps(good), seed, number // 2)]
    for text in odd:
        try:
            read_places(text, "m.onnx", folder)
            num_read += 1
        except UsageError as error:
            said.append(str(error))
    assert all("\n" not in text and len(text) < 2500 and text[-1] == "." for text in said)
    return num_read


def test_odd_documents_are_read_or_refused_in_a_line(tmp_path: Path) -> None:
    assert 0 < fuzz(tmp_path, 1, 300) < 300


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_ten_thousand_documents(tmp_path: Path, seed: int) -> None:
    assert 0 < fuzz(tmp_path, seed, 1000) < 1000
