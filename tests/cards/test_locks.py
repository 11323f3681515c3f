"""Lock files of cards: whole and in parts, between processes, and after their death."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from awaited import ended, said
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.cards.lease import SHARED_FOLDER, CardLocks, Part, held_cards, locks_folder
from qaic_ray.errors import DeviceBusy, DeviceError

HOLD = """
import sys, time
from qaic_ray.cards.lease import CardLocks, Part
part = Part(*map(int, sys.argv[2:])) if sys.argv[2:] else None
CardLocks([int(sys.argv[1])], part=part, what="another run").acquire()
print("held", flush=True)
time.sleep(600)
"""

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAIC_RAY_LOCKS", str(tmp_path / "locks"))
    return tmp_path / "locks"


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Another process that holds a card, or a part of one."""
    running: list[subprocess.Popen[str]] = []

    def start(*words: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *map(str, words)], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in running:
        process.kill()
        said(process)


def test_a_card_is_held_once_and_the_message_names_the_holder(hold: Hold) -> None:
    other = hold(3)
    with pytest.raises(DeviceBusy) as info:
        CardLocks([2, 3]).acquire()
    assert re.fullmatch(
        rf"Card 3 is in use: process {other.pid} \(another run\) holds it since "
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ; wait for its end, or run on other cards\.",
        str(info.value),
    )
    assert {card: [holder.pid for holder in some] for card, some in held_cards().items()} == {
        3: [other.pid]
    }
    # All or nothing: card 2 was given back.
    CardLocks([2]).acquire()


def test_the_death_of_its_holder_frees_a_card(hold: Hold) -> None:
    other = hold(0)
    os.kill(other.pid, signal.SIGKILL)
    CardLocks([0]).acquire(timeout_s=120)  # waits for the kernel
    ended(other)
    assert [holder.pid for holder in held_cards()[0]] == [os.getpid()]


def test_who_waits_gets_the_card_when_it_is_given_back(hold: Hold) -> None:
    other = hold(0)
    other.terminate()
    own = CardLocks([0], what="card 0")
    own.acquire(timeout_s=120)
    own.release()
    own.release()
    assert held_cards() == {}
    CardLocks([0]).acquire()


def test_parts_share_a_card_and_nobody_else_does(hold: Hold) -> None:
    first, second = hold(1, 1, 2), hold(1, 2, 2)
    with pytest.raises(DeviceBusy, match=rf"Card 1, part 2/2 is in use: process {second.pid} "):
        CardLocks([1], part=Part(2, 2)).acquire()
    with pytest.raises(DeviceBusy, match=rf"{first.pid} .* and process {second.pid} "):
        CardLocks([1]).acquire()
    CardLocks([1], part=Part(3, 7)).acquire()
    whole = hold(5)
    with pytest.raises(DeviceBusy, match=rf"Card 5, part 1/2 is in use: process {whole.pid} "):
        CardLocks([5], part=Part(1, 2)).acquire()


def test_cards_of_another_scope_are_other_cards() -> None:
    CardLocks([0]).acquire()
    CardLocks([0], scope="emulated").acquire()
    with pytest.raises(DeviceBusy):
        CardLocks([0], scope="emulated").acquire()
    assert set(held_cards()) == set(held_cards("emulated")) == {0}
    assert held_cards("else") == {}


Wish = st.tuples(
    st.integers(0, 1), st.one_of(st.none(), st.builds(Part, st.integers(1, 2), st.just(2)))
)


@given(steps=st.lists(st.one_of(Wish, st.integers(0, 9)), max_size=20))
def test_locks_are_what_the_rules_say(
    steps: list[tuple[int, Part | None] | int],
) -> None:
    """Against a model: a whole card excludes all, a part excludes itself and whole cards."""
    held: list[tuple[tuple[int, Part | None], CardLocks]] = []
    try:
        for step in steps:
            if isinstance(step, int):
                if held:
                    held.pop(step % len(held))[1].release()
                continue
            card, part = step
            own = CardLocks([card], part=part)
            excluded = any(
                card == other and (part is None or taken is None or part == taken)
                for (other, taken), _ in held
            )
            if excluded:
                with pytest.raises(DeviceBusy):
                    own.acquire()
            else:
                own.acquire()
                held.append((step, own))
    finally:
        for _, own in held:
            own.release()


def test_every_user_can_take_part(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        CardLocks([0]).acquire()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o666]


def test_a_folder_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QAIC_RAY_LOCKS", str(tmp_path / "file" / "locks"))
    with pytest.raises(DeviceError, match=r"cannot be written in .*: let QAIC_RAY_LOCKS name"):
        CardLocks([0]).acquire()


def test_where_the_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert locks_folder() == tmp_path / "locks"
    monkeypatch.delenv("QAIC_RAY_LOCKS")
    monkeypatch.setenv("QAIC_RAY_CACHE", str(tmp_path))
    assert locks_folder() == tmp_path / "cards"
    monkeypatch.delenv("QAIC_RAY_CACHE")
    assert locks_folder() == SHARED_FOLDER


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_what_is_no_lock_file_is_neither_written_nor_waited_for(folder: Path, kind: str) -> None:
    """Everybody may write where the locks of all users are."""
    folder.mkdir()
    mine = folder.parent / "mine"
    mine.write_text("precious")
    host = os.uname().nodename
    at = folder / f"{host}-card-0.lock"
    if kind == "link":
        at.symlink_to(mine)
    elif kind == "hard link":
        at.hardlink_to(mine)
    elif kind == "pipe":
        os.mkfifo(at)
    else:
        at.mkdir()
    with pytest.raises(DeviceError, match="lock files of the cards cannot be written"):
        CardLocks([0]).acquire()
    assert held_cards() == {}
    assert mine.read_text() == "precious"


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "null", '{"pid": 1}', '{"pid": "x", "started": 1, "since": [], "what": {}}'],
)
def test_a_lock_file_that_says_anything_else_has_no_holder(folder: Path, text: str) -> None:
    folder.mkdir()
    host = os.uname().nodename
    (folder / f"{host}-card-0.lock").write_text(text)
    (folder / f"{host}-card-zero.lock").write_text(text)
    (folder / f"{host}-card-{'9' * 200}.lock").write_text(text)
    assert held_cards() == {}


def test_the_shared_folder_is_no_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder.parent / "home"
    home.mkdir()
    folder.symlink_to(home)
    monkeypatch.delenv("QAIC_RAY_LOCKS")
    monkeypatch.delenv("QAIC_RAY_CACHE", raising=False)
    with pytest.raises(DeviceError, match="it is a link"):
        CardLocks([0], shared_folder=folder).acquire()
    assert list(home.iterdir()) == []
