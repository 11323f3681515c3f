"""Every wait of a test has a limit, and names what it waited for."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from pathlib import Path

import awaited
import pytest

TESTS = Path(__file__).parents[1]
OWN_LIMITS = {"COMPILED", "KernelLoader(1)", "loader", "patience"}
"""What waits by a method of its own, whose limit is its own."""


def unlimited(path: Path) -> list[str]:
    """Calls of `wait`, `join`, `communicate` and `ray.get` that may last for ever."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_asyncio = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Await)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        receiver, name = ast.unparse(node.func.value), node.func.attr
        bare = not node.args and not node.keywords and id(node) not in of_asyncio
        waits = name in ("wait", "join", "communicate") and bare and receiver not in OWN_LIMITS
        gets = (receiver, name) == ("ray", "get") and not any(
            word.arg == "timeout" for word in node.keywords
        )
        if waits or gets:
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_test_waits_without_a_limit() -> None:
    paths = sorted(TESTS.rglob("*.py"))
    assert len(paths) > 200
    assert [call for path in paths for call in unlimited(path)] == []


def test_the_scan_finds_them(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(
        "p.wait()\np.wait(3)\nt.join()\n', '.join(w)\np.communicate()\nray.get(r)\n"
        "ray.get(r, timeout=1)\nasync def f():\n    await e.wait()\n"
    )
    calls = ["1: p.wait()", "3: t.join()", "5: p.communicate()", "6: ray.get(r)"]
    assert unlimited(path) == [f"some.py:{call}" for call in calls]


@pytest.mark.parametrize("how", [awaited.ended, awaited.said])
def test_a_process_that_hangs_is_named_and_ended(how: object) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(command) as process:
        with pytest.raises(AssertionError, match=rf"process {process.pid} \(.*did not end in 0 s"):
            how(process, 0.2)  # type: ignore[operator]
        assert process.wait(60) == -9


def test_one_that_ends_gives_what_it_has() -> None:
    command = [sys.executable, "-c", "print('well'); raise SystemExit(3)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert awaited.said(process) == ("well\n", None)
    assert awaited.ended(process) == 3


def test_a_thread_that_hangs_is_named() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, args=(60,), name="the slow one")
    thread.start()
    with pytest.raises(AssertionError, match="the thread the slow one did not end in 0 s"):
        awaited.joined(thread, 0.1)
    over.set()
    awaited.joined(thread)
