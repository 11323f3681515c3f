"""Cards shared by processes: what is counted, what is refused, what the dead leave behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from awaited import ended, said
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from qaic_ray.emulator import card as cards
from qaic_ray.emulator.card import Claim, Demand, Exhausted, Machine, NoDevice
from qaic_ray.emulator.folder import Folder

GIB = 1 << 30

# Loads, activates and drops programs at random for ever; says when it holds its first.
GREEDY = """
import random, sys, time
import fake_program, qaic_ray.emulator.container
qaic_ray.emulator.container.execution = fake_program
from qaic_ray.emulator import qaicrt
chance = random.Random(int(sys.argv[1]))
context = qaicrt.Context()
held = []
while True:
    cores, constants = chance.choice([2, 7, 14]), chance.randrange(1, 8 << 30)
    qpc = qaicrt.Qpc(f"cores={cores},constants={constants}")
    program = qaicrt.Program(context, chance.randrange(4), qpc)
    if program.load() == 0 and program.activate() == 0:
        held.append((program, qaicrt.ExecObj(context, program)))
    for card in context.machine.cards():
        assert all(0 <= free <= total for free, total in zip(card.free, card.total)), card
    if held:
        print("holding", flush=True)
    if held and chance.random() < 0.6:
        held.pop(chance.randrange(len(held)))
    time.sleep(chance.random() * 0.002)
"""


def test_two_programs_of_seven_cores_share_a_card_and_a_third_is_refused(machine: Machine) -> None:
    first = machine.claim({1: Demand(7, GIB, 1)})
    second = machine.claim({1: Demand(7, GIB, 1)})
    with pytest.raises(Exhausted) as refusal:
        machine.claim({1: Demand(7, GIB, 1)})
    assert (refusal.value.qid, refusal.value.resource) == (1, "nsp")
    card = machine.card(1)
    assert card.free == Demand(0, card.total.dram_bytes - 2 * GIB, 14)
    assert (card.num_loaded, card.num_active) == (2, 2)
    first.release()
    assert machine.card(1).free.num_nsps == 7
    second.release()


def test_a_demand_over_several_cards_is_all_or_nothing(machine: Machine) -> None:
    taken = machine.claim({2: Demand(14, 0, 1)})
    with pytest.raises(Exhausted):
        machine.claim(dict.fromkeys([0, 1, 2], Demand(1, GIB, 1)))
    assert machine.card(0).free == machine.card(0).total
    taken.release()


def test_a_refused_change_keeps_what_was_held(machine: Machine) -> None:
    claim = machine.claim({0: Demand(0, GIB, 0)})
    with pytest.raises(Exhausted) as refusal:
        claim.change({0: Demand(14, 100 * GIB, 1)})
    assert refusal.value.resource == "dram"
    assert machine.card(0).free.dram_bytes == machine.card(0).total.dram_bytes - GIB
    claim.release()
    claim.release()
    with pytest.raises(RuntimeError, match="released"):
        claim.change({})


def test_a_card_that_is_not_there(machine: Machine) -> None:
    with pytest.raises(NoDevice):
        machine.claim({9: Demand(1)})
    with pytest.raises(NoDevice):
        machine.card(100)


def test_sixteen_channels_and_no_more(machine: Machine) -> None:
    claim = machine.claim({0: Demand(0, 0, 16)})
    with pytest.raises(Exhausted) as refusal:
        machine.claim({0: Demand(0, 0, 1)})
    assert refusal.value.resource == "vc"
    claim.release()


def test_a_forgotten_claim_is_free(machine: Machine) -> None:
    machine.claim({3: Demand(14, GIB, 1)})
    assert machine.card(3).free == machine.card(3).total


def test_a_claim_that_the_end_of_the_process_gave_back_is_not_held(machine: Machine) -> None:
    claim = machine.claim({3: Demand(14, GIB, 1)})
    assert claim.held
    claim._finalizer()  # as Python does at exit, before finalizers that were made earlier
    assert not claim.held
    with pytest.raises(RuntimeError, match="this claim was released"):
        claim.change({3: Demand(7, GIB, 1)})
    claim.release()
    assert machine.card(3).free == machine.card(3).total


def test_a_derived_device_has_its_part_and_dies_with_its_claim(machine: Machine) -> None:
    qid, reservation = machine.reserve(2, Demand(4, 5 * GIB, 2))
    assert qid == 100
    assert machine.card(2).free.num_nsps == 10
    assert machine.card(2).num_loaded == 0
    inside = machine.claim({100: Demand(3, GIB, 1)})
    with pytest.raises(Exhausted):
        machine.claim({100: Demand(2, 0, 1)})
    assert machine.card(100).free == Demand(1, 4 * GIB, 1)
    assert machine.card(2).free.num_nsps == 10
    assert machine.is_ready(100)
    reservation.release()
    assert not machine.is_ready(100)
    # A program that still names the lost device must not land on the next one.
    other, next_reservation = machine.reserve(2, Demand(14, 0, 16))
    assert other == 101
    inside.release()
    next_reservation.release()


def test_error_state_is_seen_by_everyone_until_a_reset(machine: Machine) -> None:
    other = Machine.here()
    machine.set_status(1, cards.ERROR)
    assert not other.is_ready(1)
    assert [card.status for card in other.cards()] == [1, 2, 1, 1]
    other.set_status(1, cards.READY)
    assert machine.is_ready(1)


def test_an_ultra_board_is_four_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAIC_EMULATOR_STATE", str(tmp_path / "state"))
    ultra = Machine(Folder(tmp_path, "1.21.6", num_cards=2, sku="ultra"))
    assert [card.qid for card in ultra.cards()] == list(range(8))
    assert ultra.card(7).total == Demand(16, 31391744 * 1024, 16)


FORK = """
import os, sys
from qaic_ray.emulator.card import Demand, Machine
machine = Machine.here()
claim = machine.claim({0: Demand(14, 1 << 30, 1)})
child = os.fork()
if child == 0:
    print("child", claim.held, machine.card(0).free.num_nsps, flush=True)
    claim.release()
    os._exit(0)
os.waitpid(child, 0)
print("parent", claim.held, machine.card(0).free.num_nsps, flush=True)
if os.fork() == 0:  # this child outlives its parent, and must not keep the parent's claim
    sys.stdin.read()
os._exit(0)
"""


def test_a_forked_child_holds_nothing_and_frees_nothing(machine: Machine) -> None:
    command = [sys.executable, "-c", FORK]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ended(process)
        deadline = time.monotonic() + 120
        while machine.card(0).free != machine.card(0).total:
            assert time.monotonic() < deadline, "the child keeps its parent's claim"
        process.stdin.close()
        assert process.stdout.read() == "child False 0\nparent True 0\n"


def start_greedy(seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", GREEDY, str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def kill_at_random(machine: Machine, num_processes: int, at_once: int) -> None:
    chance = random.Random(num_processes)
    alive: list[subprocess.Popen[str]] = []
    for seed in range(num_processes):
        alive.append(start_greedy(seed))
        if len(alive) == at_once:
            kill(alive.pop(chance.randrange(at_once)), chance)
        for card in machine.cards():
            assert all(
                0 <= free <= total for free, total in zip(card.free, card.total, strict=True)
            )
    for process in alive:
        kill(process, chance)


def kill(process: subprocess.Popen[str], chance: random.Random) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    time.sleep(chance.random() * 0.01)
    assert process.poll() is None
    process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV]))
    said(process)


def test_killed_processes_leave_nothing_behind(machine: Machine) -> None:
    kill_at_random(machine, num_processes=12, at_once=4)
    assert all(card.free == card.total for card in machine.cards())
    assert os.listdir(machine.state / "claims") == []


@pytest.mark.slow
def test_two_hundred_killed_processes_leave_nothing_behind(machine: Machine) -> None:
    kill_at_random(machine, num_processes=200, at_once=20)
    assert all(card.free == card.total for card in machine.cards())
    assert os.listdir(machine.state / "claims") == []


def test_a_torn_claim_of_a_dead_process_is_removed(machine: Machine) -> None:
    (machine.state / "claims" / "1-0-1").write_text('{"takes": {"0": [1')
    assert machine.card(0).free == machine.card(0).total
    assert os.listdir(machine.state / "claims") == []


def test_state_of_a_claim_is_readable(machine: Machine) -> None:
    claim = machine.claim({0: Demand(1, 2, 3)})
    (name,) = os.listdir(machine.state / "claims")
    assert json.loads((machine.state / "claims" / name).read_text()) == {"takes": {"0": [1, 2, 3]}}
    claim.release()


demands = st.builds(Demand, st.integers(0, 8), st.integers(0, 9 * GIB), st.integers(0, 9))


class Counting(RuleBasedStateMachine):
    """The machine against the obvious model: a list of what is held."""

    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine.here()
        self.held: dict[int, dict[int, Demand]] = {}

    def free(self, without: int | None = None) -> dict[int, Demand]:
        free = {card.qid: card.total for card in self.machine.cards()}
        for key, demands_ in self.held.items():
            if key != without:
                for qid, demand in demands_.items():
                    free[qid] = Demand(*(a - b for a, b in zip(free[qid], demand, strict=True)))
        return free

    def fits(self, wanted: dict[int, Demand], free: dict[int, Demand]) -> bool:
        return all(
            w <= f for q, demand in wanted.items() for w, f in zip(demand, free[q], strict=True)
        )

    @rule(target=claims, wanted=st.dictionaries(st.integers(0, 3), demands, max_size=2))
    def claim(self, wanted: dict[int, Demand]) -> Claim | None:
        if not self.fits(wanted, self.free()):
            with pytest.raises(Exhausted):
                self.machine.claim(wanted)
            return None
        claim = self.machine.claim(wanted)
        self.held[id(claim)] = wanted
        return claim

    @rule(claim=claims, wanted=st.dictionaries(st.integers(0, 3), demands, max_size=2))
    def change(self, claim: Claim | None, wanted: dict[int, Demand]) -> None:
        if claim is None or not claim.held:
            return
        if not self.fits(wanted, self.free(without=id(claim))):
            with pytest.raises(Exhausted):
                claim.change(wanted)
            return
        claim.change(wanted)
        self.held[id(claim)] = wanted

    @rule(claim=consumes(claims))
    def release(self, claim: Claim | None) -> None:
        if claim is not None:
            claim.release()
            self.held.pop(id(claim), None)

    @invariant()
    def counts_agree(self) -> None:
        assert {card.qid: card.free for card in self.machine.cards()} == self.free()

    def teardown(self) -> None:
        for names in self._held_claims():
            names.release()

    def _held_claims(self) -> list[Claim]:
        return [claim for claim in cards._open_claims if id(claim) in self.held]


def test_counting_agrees_with_the_model(machine: Machine) -> None:
    Counting.TestCase.settings = settings(stateful_step_count=20)
    Counting.TestCase("runTest").runTest()
