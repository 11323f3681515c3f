"""Each check of `doctor`, given any facts: no machine is looked at."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qaic_ray import limits
from qaic_ray.doctor.checks import of_cluster, of_machine, worst
from qaic_ray.doctor.facts import (
    CardFacts,
    DeviceNode,
    Disk,
    Finding,
    MachineFacts,
    NodeFacts,
    Port,
    RayFacts,
    SdkFacts,
    Verdict,
)
from qaic_ray.sdk import Device

GIB = 2**30
SDK = SdkFacts(
    root="/opt/qti-aic",
    kind="real",
    apps="1.20.2",
    platform="1.20.4",
    bindings=("qaicrt.cpython-310-x86_64-linux-gnu.so", "qaicrt.cpython-312-x86_64-linux-gnu.so"),
)
NODES = tuple(DeviceNode(f"/dev/accel/accel{i}", "qaic", usable=True) for i in range(2))
CARDS = CardFacts(
    devices=tuple(
        Device(qid, "Ready", "PCIe", 14, 14, 16308 * 2**20, 16308 * 2**20) for qid in range(2)
    ),
    nodes=NODES,
    on_bus=2,
    parameters={"control_resp_timeout_s": 250, "wait_exec_default_timeout_ms": 5000},
)
WELL = MachineFacts(
    host="dl2q",
    python="3.10.12",
    sdk=SDK,
    cards=CARDS,
    ray=RayFacts(version="2.60.0", auth_mode="token", token_file="/home/u/.ray/auth_token"),
    ports=(Port(6379, "a head's own port"), Port(8265, "the dashboard's")),
    disks=(
        Disk("runs and QPCs", "/data", 500 * GIB, 400 * GIB),
        Disk("Ray", "/tmp", 500 * GIB, 400 * GIB),
        Disk("shared memory", "/dev/shm", 8 * GIB, 8 * GIB),
    ),
    memory_bytes=768 * GIB,
    free_memory_bytes=700 * GIB,
    time_s=1_800_000_000.0,
    is_synced=True,
)
EMULATED = replace(
    WELL,
    sdk=SdkFacts(
        root="/sdk", kind="emulated", apps="1.20", platform="1.20", bindings=("qaicrt.py",), cards=2
    ),
    cards=CardFacts(devices=CARDS.devices),
)


def card(**changes: object) -> MachineFacts:
    """A machine whose second card is different."""
    devices = (CARDS.devices[0], replace(CARDS.devices[1], **changes))  # type: ignore[arg-type]
    return replace(WELL, cards=replace(CARDS, devices=devices))


def cards(**changes: object) -> MachineFacts:
    return replace(WELL, cards=replace(CARDS, **changes))  # type: ignore[arg-type]


def sdk(**changes: object) -> MachineFacts:
    return replace(WELL, sdk=replace(SDK, **changes))  # type: ignore[arg-type]


def ray(**changes: object) -> MachineFacts:
    return replace(WELL, ray=replace(WELL.ray, **changes))  # type: ignore[arg-type]


def disk(**changes: object) -> MachineFacts:
    first, *others = WELL.disks
    return replace(WELL, disks=(replace(first, **changes), *others))  # type: ignore[arg-type]


def not_well(facts: MachineFacts) -> list[Finding]:
    return [one for one in of_machine(facts) if one.verdict is not Verdict.OK]


@pytest.mark.parametrize("facts", [WELL, EMULATED], ids=["real", "emulated"])
def test_a_machine_that_is_well_has_one_line_for_each_check(facts: MachineFacts) -> None:
    found = of_machine(facts)
    assert {one.verdict for one in found} == {Verdict.OK}
    assert len({one.check for one in found}) == len(found) >= 12
    assert {one.node for one in found} == {"dl2q"}
    assert worst(found) is Verdict.OK


ULTRA = tuple(
    Device(qid, "Ready", "Pcie Ultra", 16, 16, 31391744 * 2**10, 31391744 * 2**10, f"B{qid // 4}")
    for qid in range(8)
)


def test_the_socs_of_boards_are_shown_together() -> None:
    facts = cards(devices=ULTRA, on_bus=8)
    said = {one.check: one.says for one in of_machine(facts)}
    assert said["cards"] == ("8 ready: Ultra of 16 NSPs and 30 GiB on 2 boards (QID 0-3, 4-7)")
    lacking = not_well(cards(devices=ULTRA[:5] + ULTRA[6:], on_bus=7))
    assert [(one.check, one.verdict) for one in lacking] == [("board B1", Verdict.WARN)]
    assert lacking[0].says == "It shows 3 of the 4 SoCs of an Ultra board: QID 4, 6, 7."


BAD: dict[str, tuple[MachineFacts, str, Verdict, str, str]] = {
    # the facts, the check, how bad, a part of what is said, a part of the remedy
    "no SDK": (sdk(error="There is no SDK."), "SDK", Verdict.FAIL, "no SDK", "--sdk"),
    "a part lacks": (
        sdk(broken=("tools/qaic-util",)), "SDK", Verdict.FAIL, "tools/qaic-util", "as root",
    ),
    "two releases": (
        sdk(platform="1.12.0.88P"), "versions", Verdict.WARN, "two releases", "SDK 1.20",
    ),
    "no platform": (sdk(platform=""), "versions", Verdict.WARN, "platform.xml", "1.20"),
    "too old": (
        sdk(apps="1.9.1", platform="1.9"), "versions", Verdict.FAIL, "retained-state", "1.12",
    ),
    "other Python": (
        replace(WELL, python="3.11.7"), "Python", Verdict.FAIL, "3.10 or 3.12", "venv",
    ),
    "Python too old": (
        sdk(bindings=("qaicrt.cpython-38-x86_64-linux-gnu.so",)),
        "Python", Verdict.FAIL, "for Python 3.8", "install an Apps SDK",
    ),
    "no binding": (sdk(bindings=()), "Python", Verdict.FAIL, "no qaicrt", "Apps SDK"),
    "untagged": (sdk(bindings=("qaicrt.so",)), "Python", Verdict.WARN, "does not say", "import"),
    "no driver": (
        cards(nodes=(), parameters=None), "device nodes", Verdict.FAIL, "not loaded", "modprobe",
    ),
    "no node": (cards(nodes=()), "device nodes", Verdict.FAIL, "made no device", "dmesg"),
    "not in group": (
        cards(nodes=(replace(NODES[0], usable=False),)),
        "device nodes", Verdict.FAIL, "group qaic", "usermod -aG qaic",
    ),
    "old login": (
        cards(nodes=(replace(NODES[0], usable=False),), in_group=frozenset({"qaic"})),
        "device nodes", Verdict.FAIL, "may not use", "log in again",
    ),
    "tool fails": (cards(error="qaic-util failed: x"), "cards", Verdict.FAIL, "failed", "by hand"),
    "no card": (
        cards(devices=(), nodes=(), on_bus=0), "cards", Verdict.FAIL, "no card", "lspci",
    ),
    "one gone": (
        cards(devices=CARDS.devices[:1]), "cards", Verdict.FAIL, "2 cards should", "restart",
    ),
    "in error": (card(status="Error"), "card 1", Verdict.FAIL, "Error", "-s -p PCI"),
    "starting": (card(status="Initializing"), "card 1", Verdict.WARN, "Initializing", "Wait"),
    "fewer NSPs": (
        card(nsp_total=13, nsp_free=13), "card 1", Verdict.WARN, "13 NSPs", "Compile for 13",
    ),
    "stranger": (card(nsp_free=2), "card 1", Verdict.WARN, "12 of its 14", "fuser"),
    "held": (
        cards(held={1: "process 7 (a run) holds it"}),
        "card locks", Verdict.WARN, "1: process 7", "other cards",
    ),
    "short time-out": (
        cards(parameters={"control_resp_timeout_s": 60}),
        "driver time-outs", Verdict.WARN, "is 60", "echo 250",
    ),
    "no Ray": (ray(version=""), "Ray", Verdict.FAIL, "imported", "pip install"),
    "old Ray": (ray(version="2.9.1"), "Ray", Verdict.FAIL, "older than 2.60", "pip install"),
    "new Ray": (ray(version="2.61.0"), "Ray", Verdict.WARN, "newer", "2.60"),
    "open token": (ray(token_is_open=True), "Ray's token", Verdict.WARN, "every user", "chmod"),
    "no auth": (ray(auth_mode="disabled"), "Ray's auth", Verdict.WARN, "disabled", "Unset"),
    "no token": (ray(token_file=""), "Ray's auth", Verdict.WARN, "no token", "Copy"),
    "port": (
        replace(WELL, ports=(Port(8265, "the dashboard's", is_taken=True, owner="nginx"),)),
        "ports", Verdict.WARN, "nginx listens on 8265", "--dashboard-port",
    ),
    "little disk": (
        disk(free_bytes=5 * GIB, total_bytes=50 * GIB), "disk", Verdict.WARN, "5.0 GiB", "folder",
    ),
    "full disk": (disk(free_bytes=10 * 2**20), "disk", Verdict.FAIL, "100% full", "Make room"),
    "95 percent": (disk(free_bytes=20 * GIB), "disk", Verdict.WARN, "96% full", "Ray stops"),
    "no write": (disk(error="no"), "disk", Verdict.FAIL, "cannot be written", "another disk"),
    "small shm": (
        replace(WELL, disks=(WELL.disks[0], Disk("shared memory", "/dev/shm", 64 * 2**20, 0))),
        "disk", Verdict.WARN, "64 MiB", "--shm-size",
    ),
    "no memory": (replace(WELL, free_memory_bytes=GIB), "memory", Verdict.WARN, "1.0 of", "fewer"),
    "little memory": (
        replace(WELL, free_memory_bytes=5 * GIB), "memory", Verdict.WARN, "compile", "--jobs 1",
    ),
    "clock unset": (replace(WELL, time_s=3.0), "clock", Verdict.FAIL, "never set", "ntp"),
    "clock alone": (replace(WELL, is_synced=False), "clock", Verdict.WARN, "No server", "ntp"),
    "emulated beside cards": (
        replace(EMULATED, cards=replace(EMULATED.cards, on_bus=8)),
        "device nodes", Verdict.WARN, "has cards", "--sdk real",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_well_is_said_once_with_its_remedy(name: str) -> None:
    facts, check, verdict, says, remedy = BAD[name]
    found = [one for one in not_well(facts) if one.check == check]
    assert [one.verdict for one in found] == [verdict]
    assert says in found[0].says
    assert remedy in found[0].remedy
    assert found[0].remedy


@pytest.mark.parametrize("name", sorted(set(BAD) - {"no card", "no driver"}))
def test_one_fault_is_one_line(name: str) -> None:
    assert len(not_well(BAD[name][0])) == 1


def test_the_pair_of_the_dl2q_images_is_known_to_work() -> None:
    facts = sdk(apps="1.14.2.0A", platform="1.12.0.88P")
    assert not_well(facts) == []
    (versions,) = [one for one in of_machine(facts) if one.check == "versions"]
    assert "--io cache-index" in versions.says


def test_pythons_are_those_of_the_package() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project.read_text())
    assert tuple(named) == limits.PYTHONS


def test_a_port_of_ray_s_own_is_no_fault() -> None:
    port = Port(6379, "a head's own port", is_taken=True, owner="gcs_server")
    assert not_well(replace(WELL, ports=(port,))) == []


def node(name: str, facts: MachineFacts | None = WELL, **more: object) -> NodeFacts:
    return NodeFacts(name, facts, shared="seen", skew_s=0.1, **more)  # type: ignore[arg-type]


def of_all(*nodes: NodeFacts) -> dict[str, Finding]:
    found = of_cluster(nodes, WELL, "/data")
    return {one.check: one for one in found if one.verdict is not Verdict.OK}


def test_nodes_that_are_well() -> None:
    found = of_cluster([node("a"), node("b")], WELL, "/data")
    assert worst(found) is Verdict.OK
    assert {one.node for one in found} == {"a", "b", ""}
    assert [one.says for one in found if one.check == "shared folder"] == [
        "/data is the same on all nodes"
    ]


def test_nodes_against_each_other() -> None:
    other = replace(WELL, ray=replace(WELL.ray, version="2.59.1"), python="3.12.1")
    found = of_all(node("a"), node("b", other))
    assert "b has Ray 2.59.1, and this machine 2.60.0" in found["Ray of all nodes"].says
    assert "b has Python 3.12" in found["Python of all nodes"].says
    found = of_all(node("a"), node("b", sdk(apps="1.21", platform="1.21")))
    assert found["SDK of all nodes"].verdict is Verdict.WARN
    found = of_all(node("a"), replace(node("b"), skew_s=-90.0))
    assert "90.0 s behind" in found["clocks of all nodes"].says
    assert found["clocks of all nodes"].verdict is Verdict.FAIL
    assert of_all(node("a"), replace(node("b"), skew_s=3.0, skew_error_s=2.0)) == {}
    found = of_all(node("a"), replace(node("b"), shared="absent"))
    assert found["shared folder"].says == "b does not see /data of this machine."
    found = of_all(node("a"), NodeFacts("b", error="It did not answer within 60 s."))
    assert found["node"].node == "b"
    assert found["node"].verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.60.0rc1", (2, 60, 0)), ("1.12.0.88P", (1, 12, 0, 88)), ("", ()), ("x", ())],
)
def test_versions_are_their_numbers(text: str, version: limits.Version) -> None:
    assert limits.version_of(text) == version
