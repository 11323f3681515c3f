"""Facts of machines: a made-up one with cards, the emulated SDK whole, broken, and with faults."""

from __future__ import annotations

import grp
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qaic_ray.doctor import card_trial
from qaic_ray.doctor.checks import of_machine
from qaic_ray.doctor.facts import Finding, MachineFacts, Verdict
from qaic_ray.doctor.probes import machine_facts, ports, ray_facts, sdk_facts
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import Sdk, find_sdk, install_emulated, open_sdk

TWO = EmulatorOptions(cards=2)


@pytest.fixture(scope="module")
def sdk_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_emulated(tmp_path_factory.mktemp("doctor") / "sdk", TWO)


@pytest.fixture
def sdk(sdk_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sdk:
    """Cards of this test's own."""
    monkeypatch.setenv("QAIC_EMULATOR_STATE", str(tmp_path / "state"))
    return open_sdk(sdk_root)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root with a driver, two cards on the bus, and their nodes."""
    root = tmp_path / "root"
    for name, text in {
        "sys/bus/pci/devices/0000:36:00.0/vendor": "0x17cb",
        "sys/bus/pci/devices/0000:36:00.0/device": "0xa100",
        "sys/bus/pci/devices/0000:37:00.0/vendor": "0x17cb",
        "sys/bus/pci/devices/0000:37:00.0/device": "0xa100",
        "sys/bus/pci/devices/0000:00:00.0/vendor": "0x8086",
        "sys/bus/pci/devices/0000:00:00.0/device": "0xa100",
        "sys/module/qaic/parameters/control_resp_timeout_s": "60",
        "sys/module/qaic/parameters/poll_datapath": "N",
        "dev/accel/accel0": "",
        "dev/accel/accel1": "",
        "proc/meminfo": "MemTotal: 1024 kB\nMemAvailable: 512 kB\nHugePages_Total: 3\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def bad(facts: MachineFacts) -> dict[str, Finding]:
    """What is not well of the SDK and the cards."""
    here = {"SDK", "versions", "Python", "device nodes", "cards", "card locks", "card trial"}
    found = [one for one in of_machine(facts) if one.verdict is not Verdict.OK]
    named = [o for o in found if o.check in here or o.check.startswith("card ")]
    return {one.check: one for one in reversed(named)}  # the first of each


def facts_of(sdk: Sdk, folder: Path, *, tries_cards: bool = False) -> MachineFacts:
    nowhere = folder / "nothing"  # no driver, no card of this machine
    return machine_facts(str(sdk.root), TWO, folder, tries_cards=tries_cards, root=nowhere)


def test_the_emulated_sdk_is_well(sdk: Sdk, tmp_path: Path) -> None:
    facts = facts_of(sdk, tmp_path)
    assert bad(facts) == {}
    assert (facts.sdk.cards, len(facts.cards.devices)) == (2, 2)
    assert facts.sdk.bindings == ("qaicrt.py",)
    assert facts.ray.version


def test_a_machine_with_cards(sdk: Sdk, machine: Path, tmp_path: Path) -> None:
    facts = machine_facts(str(sdk.root), TWO, tmp_path, root=machine)
    assert facts.cards.on_bus == 2
    assert facts.cards.parameters == {"control_resp_timeout_s": 60}
    assert [node.path for node in facts.cards.nodes] == ["/dev/accel/accel0", "/dev/accel/accel1"]
    group = grp.getgrgid(os.getgid()).gr_name
    assert [(node.group, node.usable) for node in facts.cards.nodes] == [(group, True)] * 2
    assert (facts.memory_bytes, facts.free_memory_bytes) == (1024 * 1024, 512 * 1024)


def test_no_sdk(tmp_path: Path) -> None:
    facts = machine_facts(str(tmp_path / "none"), TWO, tmp_path, root=tmp_path)
    assert "There is no Cloud AI SDK folder" in bad(facts)["SDK"].says


BREAKS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no tool": (lambda root: (root / "tools/qaic-util").unlink(), "SDK", "tools/qaic-util"),
    "not to be run": (lambda root: (root / "exec/qaic-exec").chmod(0o644), "SDK", "exec/qaic-exec"),
    "no descriptors": (
        lambda root: (root / "dev/python/QAicApi_pb2.py").unlink(), "SDK", "QAicApi_pb2.py",
    ),
    "no version": (lambda root: (root / "versions/apps.xml").unlink(), "SDK", "versions/apps.xml"),
    "no XML": (lambda root: (root / "versions/apps.xml").write_text("<"), "SDK", "is not XML"),
    "no platform": (
        lambda root: (root / "versions/platform.xml").write_text("<"), "versions", "platform.xml",
    ),
    "no module": (
        lambda root: [path.unlink() for path in root.glob("dev/lib/*/qaicrt.py")],
        "Python", "no qaicrt module",
    ),
    "other Python": (
        lambda root: [
            path.rename(path.with_name("qaicrt.cpython-38-x86_64-linux-gnu.so"))
            for path in root.glob("dev/lib/*/qaicrt.py")
        ],
        "Python", "for Python 3.8",
    ),
    "tool fails": (
        lambda root: (root / "tools/qaic-util").write_text("#!/bin/sh\necho no driver >&2; exit 1"),
        "cards", "no driver",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_sdk_folder(sdk_root: Path, tmp_path: Path, name: str) -> None:
    breaks, check, says = BREAKS[name]
    root = tmp_path / "sdk"
    shutil.copytree(sdk_root, root)
    breaks(root)
    found = bad(machine_facts(str(root), TWO, tmp_path, root=tmp_path))
    assert says in found[check].says
    assert found[check].remedy


def test_a_port_and_its_owner() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        number = server.getsockname()[1]
        (port,) = ports(Path("/"), [number])
        assert port.is_taken
        assert port.owner == Path("/proc/self/comm").read_text().strip()
    assert [port.is_taken for port in ports(Path("/nowhere"), [number])] == [False]


def test_a_token_that_others_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert ray_facts(tmp_path).token_file == ""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("x")
    token.chmod(0o644)
    assert ray_facts(tmp_path).token_is_open
    token.chmod(0o600)
    assert not ray_facts(tmp_path).token_is_open


# -- with cards tried


@pytest.fixture(scope="module")
def program(sdk_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return card_trial.compile_program(open_sdk(sdk_root), tmp_path_factory.mktemp("trial"))


@pytest.fixture
def tried(
    sdk: Sdk, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, Finding]]:
    """What doctor finds where cards have a fault."""
    monkeypatch.setattr(card_trial, "compile_program", lambda sdk, folder: program)
    timing = tmp_path / "timing.json"  # so much that the machine's load counts for little
    timing.write_text('{"mode": "pad", "base_ms": 20}')
    monkeypatch.setenv("QAIC_EMULATOR_TIMING", str(timing))

    def find(entry: str) -> dict[str, Finding]:
        monkeypatch.setattr(card_trial, "TRIAL_S", 8.0 if "hang" in entry else 120.0)
        file = tmp_path / "faults.yaml"
        file.write_text(f"seed: 7\nfaults:\n- {{{entry}}}\n")
        monkeypatch.setenv("QAIC_EMULATOR_FAULTS", str(file))
        return bad(facts_of(sdk, tmp_path, tries_cards=True))

    return find


FAULTS = {
    # the fault, the checks that find it, a part of what they say
    "absent": ("kind: absent, device: 1", {"cards": "2 cards should be there, and 1 are"}),
    "error": ("kind: error, device: 1, after: 3", {"card 1": "status is Error"}),
    "hang": ("kind: hang, device: 1, at: 5", {"card 1": "did not answer within 8 s"}),
    "data path": (
        "kind: data_path_timeout, device: 1, at: 2, wait_ms: 50", {"card 1": "QS_ERROR"},
    ),
    "DRAM": ("kind: load_out_of_memory, device: 1", {"card 1": "could not load"}),
    "NSPs": ("kind: nsp_allocation_failure, device: 1", {"card 1": "could not activate"}),
    "again": ("kind: again, device: 1, call: enqueue", {}),
    "kill": ("kind: kill, device: 1, at: 3", {"card 1": "process ended with -9"}),
    "corrupt": ("kind: corrupt, device: 1, at: 6", {"card 1": "Execution 6 of 16 gave a wrong"}),
    "slow": ("kind: slow, device: 1, factor: 6", {"card 1": "It is slow"}),
}  # fmt: skip


FAST_FAULTS = ("absent", "error", "NSPs", "corrupt")
"""Each of the others is found in the same way as one of these, or by its time."""


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST_FAULTS else pytest.param(name, marks=pytest.mark.slow)
        for name in FAULTS
    ],
)
def test_an_emulated_fault_of_each_kind(
    tried: Callable[[str], dict[str, Finding]], name: str
) -> None:
    entry, expected = FAULTS[name]
    found = tried(entry)
    assert set(found) == set(expected)
    for check, says in expected.items():
        assert says in found[check].says
        assert found[check].remedy


def test_every_kind_of_fault_is_here() -> None:
    from qaic_ray.emulator.card.faults import _KIND_TO_EVENT

    assert {entry.split(",")[0].split()[1] for entry, _ in FAULTS.values()} == set(_KIND_TO_EVENT)


def test_a_card_that_is_held_is_not_tried(sdk: Sdk, program: Path) -> None:
    from qaic_ray.cards.lease import CardLocks, card_scope

    locks = CardLocks([0], scope=card_scope(sdk), what="a run of another")
    locks.acquire()
    try:
        trial = card_trial._try_card(sdk, program, 0, 10.0)
    finally:
        locks.release()
    assert trial.outcome == "busy"
    assert "a run of another" in trial.says


def test_a_compiler_that_fails(sdk_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "sdk"
    shutil.copytree(sdk_root, root)
    (root / "exec" / "qaic-exec").write_text("#!/bin/sh\necho no licence >&2; exit 3\n")
    found = bad(machine_facts(str(root), TWO, tmp_path, tries_cards=True, root=tmp_path))
    assert "exit code 3: no licence" in found["card trial"].says


def test_the_machine_of_this_test_can_be_looked_at(tmp_path: Path) -> None:
    facts = machine_facts("emulated", TWO, tmp_path)
    assert sdk_facts(find_sdk("emulated", TWO)).kind == facts.sdk.kind == "emulated"
    assert facts.memory_bytes > facts.free_memory_bytes > 0
    assert len(facts.ports) == 3
    assert {disk.purpose for disk in facts.disks} >= {"runs and QPCs", "cache", "Ray"}
