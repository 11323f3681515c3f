"""What is found on nodes, which worker goes where, and what is said of a mismatch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.cards.inventory import (
    Node,
    NodeCards,
    WorkerPlace,
    allot,
    cards_name,
    look,
    place,
    problems,
    qpc_cores,
)
from qaic_ray.cards.lease import CardLocks, Part, await_ready, card_scope
from qaic_ray.errors import DeviceError, UsageError
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import Device, Sdk
from qaic_ray.timeouts import Timeouts

EMULATED = EmulatorOptions(cards=4, sku="standard", apps_version="1.20")


def device(qid: int, status: str = "Ready", nsps: int = 14) -> Device:
    nsps = nsps if status == "Ready" else 0
    return Device(qid, status, "PCIe", nsps, nsps, 2**34, 2**34)


def node(
    name: str = "a",
    *,
    offered: int = 4,
    cards: int = 4,
    host: str = "dl2q-1",
    head: bool = False,
    kept: bool = False,
    emulated: bool = False,
    chooses: bool = False,
    failed: tuple[int, ...] = (),
    error: str = "",
    nsps: int = 14,
) -> NodeCards:
    return NodeCards(
        Node(name, f"10.0.0.{ord(name[0]) - 96}", offered, head, kept, chooses),
        host,
        f"boot of {host}",
        sdk_root="/opt/qti-aic",
        sdk=f"{'emulated' if emulated else 'real'} SDK 1.20",
        emulated=emulated,
        devices=tuple(device(i, "Error" if i in failed else "Ready", nsps) for i in range(cards)),
        error=error,
    )


def shape(places: list[WorkerPlace]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(place.name, place.node_id, place.device_ids) for place in places]


# -- places


def test_every_ready_card_of_one_machine_is_a_worker() -> None:
    assert shape(place([node(failed=(2,))])) == [
        ("card 0", "a", (0,)),
        ("card 1", "a", (1,)),
        ("card 3", "a", (3,)),
    ]


def test_cards_of_several_machines_are_named_with_them() -> None:
    nodes = [node(), node("b", host="dl2q-2", offered=2, cards=2), node("c", offered=0)]
    assert shape(place(nodes, devices=[1])) == [
        ("card 1 on dl2q-1", "a", (1,)),
        ("card 1 on dl2q-2", "b", (1,)),
    ]
    twins = [node(), NodeCards(nodes[1].node, "dl2q-1", "other boot", devices=(device(0),))]
    assert place(twins)[-1].name == "card 0 on 10.0.0.2"


def test_nodes_of_one_machine_share_its_cards_out() -> None:
    nodes = [node("b", offered=2), node("a", offered=2)]
    assert shape(place(nodes)) == [
        ("card 0", "a", (0,)),
        ("card 1", "a", (1,)),
        ("card 2", "b", (2,)),
        ("card 3", "b", (3,)),
    ]
    # Two jobs mean the same node by the same card.
    assert shape(place(nodes, devices=[3])) == [("card 3", "b", (3,))]
    assert shape(place(nodes, devices=[0])) == [("card 0", "a", (0,))]


def test_a_node_that_offers_fewer_gets_those_that_are_asked_for() -> None:
    assert shape(place([node(offered=2)])) == [("card 0", "a", (0,)), ("card 1", "a", (1,))]
    assert [p.device_ids for p in place([node(offered=2)], devices=[0, 3])] == [(0,), (3,)]
    assert [p.device_ids for p in place([node(offered=2, failed=(0,))])] == [(1,), (2,)]
    with pytest.raises(UsageError, match=r'3 cards of dl2q-1 .* offers 2 .*"QAIC": 4'):
        place([node(offered=2)], devices=[0, 1, 3])


def test_parts_of_cards() -> None:
    places = place([node()], devices=[3], partitions=2, num_cores=7)
    assert [(p.name, p.device_ids, p.part) for p in places] == [
        ("card 3 part 1/2, 7 NSPs", (3,), Part(1, 2)),
        ("card 3 part 2/2, 7 NSPs", (3,), Part(2, 2)),
    ]
    assert len(place([node()], partitions=7, num_cores=2)) == 28


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partitions": 2, "num_cores": 14},
         r"for 14 NSPs and a partition of card 0 has 7 \(1/2 of 14\): .*--num-cores 7"),
        ({"partitions": 15}, "Card 0 has 14 NSPs: that is not enough for 15 partitions"),
        ({"num_cores": 16}, "for 16 NSPs and card 0 has 14: compile with --num-cores 14"),
        ({"partitions": 2, "group_size": 2}, "Parts of cards cannot be grouped"),
        ({"devices": [0, 1, 2], "group_size": 2}, "3 cards of dl2q-1 cannot be used in groups"),
        ({"devices": [9]}, "no device 9 on dl2q-1: the cards there are 0, 1, 2, 3"),
        ({"devices": [1, 1]}, "Device 1 is given twice"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_numbers(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        place([node()], **options)  # type: ignore[arg-type]


def test_groups_are_of_one_node() -> None:
    nodes = [node("a", offered=3), node("b", host="dl2q-2", offered=5, cards=5)]
    assert shape(place(nodes, group_size=2)) == [
        ("cards 0-1 on dl2q-1", "a", (0, 1)),
        ("cards 0-1 on dl2q-2", "b", (0, 1)),
        ("cards 2-3 on dl2q-2", "b", (2, 3)),
    ]
    assert cards_name((0, 2, 5)) == "cards 0,2,5"


def test_where_ray_chooses_the_cards_a_name_says_none() -> None:
    nodes = [node("a", offered=2, chooses=True), node("b", offered=2, chooses=True)]
    places = place(nodes)
    assert [p.name for p in places] == ["worker 1", "worker 2", "worker 3", "worker 4"]
    assert [p.choices for p in places] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert place(nodes, devices=[1])[0].choices == ()  # who names cards gets them


def test_cards_of_different_kinds_are_each_checked() -> None:
    nodes = [node(nsps=16), node("b", host="dl2q-2")]
    assert len(place(nodes, num_cores=14)) == 8
    with pytest.raises(UsageError, match="for 16 NSPs and card 0 has 14"):
        place(nodes, num_cores=16)


def test_emulated_cards_are_not_mixed_with_real_ones() -> None:
    nodes = [node(emulated=True, head=True), node("b", host="dl2q-2")]
    assert {p.node_id for p in place(nodes)} == {"b"}
    assert problems(nodes, "10.0.0.1:6379") == [
        "dl2q-1 (10.0.0.1) offers 4 cards to Ray that are emulated, and is left out because other "
        "nodes have real ones."
    ]
    assert {p.node_id for p in place(nodes[:1])} == {"a"}


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([], "No node of the Ray cluster offers cards"),
        ([node(offered=0)], "No node of the Ray cluster offers cards"),
        ([node(error="no SDK", cards=0)], r"No card of the cluster can be used \(dl2q-1: no SDK\)"),
        ([node(failed=(0, 1, 2, 3))], r"can be used \(4 found, and none"),
    ],
)
def test_no_card_is_one_sentence(nodes: list[NodeCards], words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        place(nodes)
    with pytest.raises(DeviceError, match="Device 2 of dl2q-1 is not ready: its status is Error"):
        place([node(failed=(2,))], devices=[2])


Machines = st.lists(
    st.tuples(
        st.integers(1, 8),  # cards
        st.lists(st.integers(0, 8), min_size=1, max_size=3),  # offered by its nodes
        st.sets(st.integers(0, 7)),  # in error
    ),
    max_size=3,
)


@given(Machines)
def test_no_card_is_given_twice_and_no_node_more_than_it_offers(
    machines: list[tuple[int, list[int], set[int]]],
) -> None:
    names: Iterator[str] = iter("abcdefghijkl")
    nodes = [
        node(next(names), offered=offered, cards=cards, host=f"m{i}", failed=tuple(failed))
        for i, (cards, offers, failed) in enumerate(machines)
        for offered in offers
    ]
    shares = allot(nodes)
    taken = [(found.machine, card.qid) for found, cards in shares for card in cards]
    assert len(set(taken)) == len(taken)
    for found, cards in shares:
        assert len(cards) <= found.node.offered
        assert all(card.ready for card in cards)
    for i, (cards, offers, failed) in enumerate(machines):
        ready = len(set(range(cards)) - failed)
        assert sum(m[0] == f"m{i}" for m, _ in taken) == min(ready, sum(offers))


def board_of(qids: range, serial: str, missing: tuple[int, ...] = ()) -> list[Device]:
    return [
        replace(device(qid, "Error" if qid in missing else "Ready"), board=serial) for qid in qids
    ]


@pytest.mark.parametrize(
    ("missing", "size", "groups"),
    [
        ((), 4, [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]),
        # A board with a failed SoC does not shift the groups of the others.
        ((1,), 4, [(4, 5, 6, 7), (8, 9, 10, 11)]),
        ((1,), 2, [(0, 2), (4, 5), (6, 7), (8, 9), (10, 11)]),
        ((1, 5), 2, [(0, 2), (3, 7), (4, 6), (8, 9), (10, 11)]),
        # Two whole boards before parts of three.
        ((1,), 8, [(4, 5, 6, 7, 8, 9, 10, 11)]),
        ((0, 4, 8), 4, [(1, 2, 3, 5), (6, 7, 9, 10)]),
        ((1,), 1, [(q,) for q in range(12) if q != 1]),
    ],
)
def test_a_group_is_of_one_board_where_that_can_be(
    missing: tuple[int, ...], size: int, groups: list[tuple[int, ...]]
) -> None:
    devices = [
        *board_of(range(4), "A", missing),
        *board_of(range(4, 8), "B", missing),
        *board_of(range(8, 12), "C", missing),
    ]
    found = replace(node(cards=12), devices=tuple(devices))
    found = replace(found, node=replace(found.node, offered=12))
    assert [where.device_ids for where in place([found], group_size=size)] == groups


# -- problems


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ([node()], None),
        ([node("a", offered=1), node("b", offered=3)], None),
        ([node(offered=0, emulated=True)], None),
        ([node(offered=2, head=True)],
         "dl2q-1 (10.0.0.1) has 4 cards and offers 2 to Ray: whoever runs Ray there is to "
         "start it with `ray start --head --resources='{\"QAIC\": 4}'`."),
        ([node(offered=6)],
         "dl2q-1 (10.0.0.1) has 4 cards and offers 6 to Ray: whoever runs Ray there is to "
         "start it with `ray start --address=h:6379 --resources='{\"QAIC\": 4}'`."),
        ([node("a", offered=1), node("b", offered=1)],
         "dl2q-1 (10.0.0.2) has 4 cards and offers 2 to Ray: whoever runs Ray there is to "
         "start it with `ray start --address=h:6379 --resources='{\"QAIC\": 3}'`."),
        ([node(offered=1, head=True, kept=True)],
         "dl2q-1 (10.0.0.1) has 4 cards and offers 1 to Ray: `qaic-ray ray stop` ends this "
         "Ray, which is kept, and the next command with --keep-ray starts one that offers all."),
        ([node(failed=(3,))], "Card 3 of dl2q-1 is not ready: its status is Error."),
        ([node(cards=0, error="There is no SDK.")],
         "dl2q-1 (10.0.0.1) offers 4 cards to Ray, and none can be seen there: There is no SDK."),
    ],
)  # fmt: skip
def test_a_mismatch_is_a_sentence_with_the_command_that_mends_it(
    nodes: list[NodeCards], sentence: str | None
) -> None:
    assert problems(nodes, "h:6379") == ([] if sentence is None else [sentence])


# -- looking


def test_a_node_tells_of_its_cards_and_who_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIC_RAY_LOCKS", str(tmp_path / "locks"))
    for name in ("exec", "tools", "versions"):
        (tmp_path / name).mkdir()
    (tmp_path / "exec" / "qaic-exec").touch()
    (tmp_path / "versions" / "apps.xml").write_text(
        "<versions><ci_build><base_version>1.20</base_version></ci_build></versions>"
    )
    tool = tmp_path / "tools" / "qaic-util"
    tool.write_text("#!/bin/sh\necho 'QID 0\n\tStatus:Ready\nQID 1\n\tStatus:Ready'\n")
    tool.chmod(0o755)
    locks = CardLocks([1], what="card 1")
    locks.acquire()
    found = look(Node("a", "10.0.0.1", 2), str(tmp_path), EMULATED)
    locks.release()
    assert [card.qid for card in found.devices] == [0, 1]
    assert list(found.held or {}) == [1]
    assert re.fullmatch(r"process \d+ \(card 1\) holds it since .*Z", (found.held or {})[1])
    assert (found.sdk, found.emulated, found.error) == ("real SDK 1.20", False, "")


def test_a_node_without_an_sdk_says_so(tmp_path: Path) -> None:
    found = look(Node("a", "10.0.0.1", 2), str(tmp_path / "x"), EMULATED)
    assert (found.devices, found.error) == ((), f"There is no Cloud AI SDK folder {tmp_path}/x.")


def test_real_cards_are_the_machines_and_emulated_ones_their_folders() -> None:
    assert card_scope(Sdk(Path("/opt/qti-aic"), "real", "1.20")) == ""
    scopes = {card_scope(Sdk(Path(root), "emulated", "1.20")) for root in ("/a", "/b")}
    assert len(scopes) == 2


def test_the_cores_of_a_qpc(tmp_path: Path) -> None:
    assert qpc_cores(tmp_path) is None
    (tmp_path / "variant.json").write_text(json.dumps({"num_cores": 7}))
    assert qpc_cores(tmp_path) == 7
    (tmp_path / "variant.json").write_text("[]")
    assert qpc_cores(tmp_path) is None


# -- readiness


def test_a_card_that_was_left_is_waited_for() -> None:
    states = iter(["Initializing", "Initializing", "Ready"])
    sdk = SimpleNamespace(kind="emulated", devices=lambda: [device(0, next(states)), device(1)])
    await_ready(sdk, [0, 1], Timeouts(poll_s=0.0))  # type: ignore[arg-type]
    assert next(states, None) is None


@pytest.mark.parametrize(
    ("status", "words"),
    [("Error", "card 0 is Error"), ("Initializing", "card 0 is Initializing")],
)
def test_a_card_that_does_not_come_back_is_an_error(status: str, words: str) -> None:
    at_once = Timeouts(ready_s=0.0)
    sdk = SimpleNamespace(kind="emulated", devices=lambda: [device(0, status)])
    with pytest.raises(DeviceError, match=words):
        await_ready(sdk, [0], at_once)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="card 5 is Absent"):
        await_ready(sdk, [5], at_once)  # type: ignore[arg-type]
