"""A file that is read as it was when the run began, whatever happens to it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import QaicRayError
from qaic_ray.formats import frozen_file as frozen_files
from qaic_ray.formats.frozen_file import FrozenFile, InputChanged


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Of 16 bytes: every file of a test has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_files, "BLOCK_BYTES", 16)
        yield


def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "prompts"
    path.write_bytes(content)
    return path


@given(st.binary(max_size=100), st.lists(st.tuples(st.integers(0, 120), st.integers(-1, 50))))
def test_it_reads_like_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, reads: list[tuple[int, int]]
) -> None:
    path = file(tmp_path_factory.mktemp("frozen"), content)
    frozen = FrozenFile.of(path)
    assert (frozen.num_bytes, frozen.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with frozen.open() as ours, path.open("rb") as theirs:
        assert list(ours) == list(theirs)
        for offset, size in reads:
            assert ours.seek(offset) == theirs.seek(offset)
            assert ours.read(size) == theirs.read(size)
            assert ours.tell() == theirs.tell()
        assert ours.seek(0, os.SEEK_END) == len(content)


@pytest.mark.parametrize("offset", range(0, 100, 7))
def test_what_changed_is_never_given(tmp_path: Path, offset: int) -> None:
    content = bytes(range(100))
    path = file(tmp_path, content)
    frozen = FrozenFile.of(path)
    path.write_bytes(content[:offset] + b"\xff" + content[offset + 1 :])
    whole = offset // 16 * 16
    with frozen.open() as stream:
        assert stream.read(whole) == content[:whole]
        with pytest.raises(InputChanged, match="has changed since the run began"):
            stream.read(1)


def test_what_is_appended_is_not_of_the_run(tmp_path: Path) -> None:
    path = file(tmp_path, b"a" * 40)
    frozen = FrozenFile.of(path)
    path.write_bytes(b"a" * 40 + b"b" * 40)
    with frozen.open() as stream:
        assert stream.read() == b"a" * 40
    assert FrozenFile.of(path, 40) == frozen


def test_a_file_that_shrank_is_another(tmp_path: Path) -> None:
    path = file(tmp_path, b"a" * 40)
    frozen = FrozenFile.of(path)
    os.truncate(path, 39)
    with frozen.open() as stream, pytest.raises(InputChanged):
        stream.read()
    with pytest.raises(InputChanged, match="has 39 bytes, and had 40"):
        FrozenFile.of(path, 40)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(QaicRayError, match="cannot be read: No such file"):
        FrozenFile.of(tmp_path / "none")
