"""Signals: heard once, never between a row and its place, and obeyed by a process that is stuck."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import awaited
import pytest

PROLOGUE = """
import os, signal, sys, threading, time
for number in (signal.SIGINT, signal.SIGHUP):
    if "--ignore" not in sys.argv:
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
from qaic_ray import interruption
interruption.listen(
    again_grace_s=0.2, lost_grace_s=0.2 if "--soon-given-up" in sys.argv else 25.0
)
def ready():
    print("ready", flush=True)
"""
WAITS = """
try:
    ready()
    time.sleep(60)
except KeyboardInterrupt:
    print("heard", interruption.received(), flush=True)
"""
SHIELDED = """
try:
    with interruption.uninterrupted():
        ready()
        until = time.monotonic() + 60
        while not interruption.received() and time.monotonic() < until:
            time.sleep(0.01)
        print("whole", flush=True)
    print("not reached")
except KeyboardInterrupt:
    print("heard", flush=True)
"""
STUCK = """
try:
    with interruption.last_words(lambda: "7 rows are safe."):
        ready()
        time.sleep(60)
except KeyboardInterrupt:
    print("heard", flush=True)
    ready()
    time.sleep(60)  # cleaning up does not end
"""
LOST = """
try:
    threading.Thread(target=lambda: interruption.report_loss("The raylet died")).start()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(0.01)
except KeyboardInterrupt:
    print(interruption.loss(), interruption.received(), flush=True)
"""
LOST_AND_STUCK = """
class Native:
    def __enter__(self): interruption._state.depth += 1  # as a call that runs no Python
    def __exit__(self, *_): pass
with interruption.last_words(lambda: "7 rows are safe."), Native():
    interruption.report_loss("The raylet died")
    time.sleep(60)
"""


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupted(
    script: str, numbers: Sequence[signal.Signals], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script that is sent a signal each time it is ready."""
    process = started(script, *arguments)
    assert process.stdout is not None
    said = ""
    for number in numbers:
        while (line := process.stdout.readline()) != "ready\n":
            assert line, awaited.said(process)[1]
            said += line
        os.kill(process.pid, number)
    out, err = process.communicate(timeout=120)
    return process.returncode, said + out, err


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 0), (signal.SIGHUP, 0)],
)
def test_a_signal_is_heard_and_only_sigint_is_died_of(number: signal.Signals, code: int) -> None:
    assert interrupted(WAITS, [number]) == (code, f"heard {int(number)}\n", "")


def test_nothing_is_interrupted_in_the_middle() -> None:
    assert interrupted(SHIELDED, [signal.SIGTERM]) == (0, "whole\nheard\n", "")


def test_who_does_not_end_is_ended_by_the_next_signal_with_the_last_words() -> None:
    code, out, err = interrupted(STUCK, [signal.SIGTERM, signal.SIGTERM])
    assert (code, out, err) == (143, "heard\n", "qaic-ray: 7 rows are safe.\n")


def test_a_loss_interrupts_like_a_signal() -> None:
    out, err = started(LOST).communicate(timeout=120)
    assert (out, err) == ("The raylet died None\n", "")


def test_who_is_stuck_in_a_call_when_all_is_lost_says_so_and_ends() -> None:
    process = started(LOST_AND_STUCK, "--soon-given-up")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (75, "", "qaic-ray: 7 rows are safe.\n")


def test_what_the_parent_had_ignored_stays_ignored_and_sigterm_works() -> None:
    ignoring = PROLOGUE + WAITS
    code = "import os, signal, sys; [signal.signal(n, signal.SIG_IGN) for n in (1, 2)]; "
    code += "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, ignoring, "--ignore"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGHUP, signal.SIGINT):
        os.kill(process.pid, number)
    time.sleep(0.2)  # nothing is to come of them
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=120)[0] == f"heard {int(signal.SIGTERM)}\n"
