"""The cards of every node, as plain data: which are there, and how many it offers to Ray.

`look` runs on each node and finds its cards. `problems` names the nodes that offer another number
of cards to Ray than they have, each with the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qaic_ray.cards.lease import card_scope, held_cards
from qaic_ray.errors import DeviceError, SdkNotFound
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import Device, find_sdk

CARD_RESOURCE = "QAIC"
"""One unit of this Ray resource is one card."""


@dataclass(frozen=True)
class Node:
    """A node as its Ray cluster describes it.

    `offered` is its `QAIC` resource; `chooses` says whether Ray itself chooses which of a node's
    cards an actor gets (`custom_unit_instance_resources`).
    """

    node_id: str
    address: str
    offered: int
    is_head: bool = False
    chooses: bool = False


@dataclass(frozen=True)
class NodeCards:
    """What was found on a node: its machine, SDK and cards.

    Two nodes on one machine (`host` and `boot_id`) see the same cards. `held` maps the id of a card
    that is in use to who uses it; `error` says why there are no cards.
    """

    node: Node
    host: str
    boot_id: str
    sdk_root: str = ""
    sdk: str = ""
    emulated: bool = False
    devices: tuple[Device, ...] = ()
    held: Mapping[int, str] | None = None
    error: str = ""

    @property
    def machine(self) -> tuple[str, str]:
        """The machine within which a card's id is unique."""
        return self.host, self.boot_id


def look(node: Node, sdk: str | None, emulated: EmulatorOptions) -> NodeCards:
    """Find the cards of this node; runs on it.

    Args:
        node: this one.
        sdk: as the job names it, see `find_sdk`; each node finds its own.
        emulated: what the emulated SDK is to be, where it is the one.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    here = NodeCards(node, os.uname().nodename, boot_id)
    try:
        found = find_sdk(sdk, emulated)
        devices = tuple(found.devices())
    except (SdkNotFound, DeviceError) as error:
        return replace(here, error=str(error))
    held = held_cards(card_scope(found))
    return replace(
        here,
        sdk_root=str(found.root),
        sdk=found.label,
        emulated=found.kind == "emulated",
        devices=devices,
        held={device_id: " and ".join(map(str, some)) for device_id, some in held.items()},
    )


def problems(nodes: Sequence[NodeCards], head: str) -> list[str]:
    """A sentence, with the remedy, for each reason why cards cannot be used.

    Args:
        nodes: what was found.
        head: the head's address, for the command.
    """
    found_problems: list[str] = []
    used = usable(nodes)
    for found in nodes:
        label = f"{found.host} ({found.node.address})"
        if found.error and found.node.offered:
            found_problems.append(
                f"{label} offers {_cards(found.node.offered)} to Ray, and none can be seen there: "
                f"{found.error}"
            )
        elif found.node.offered and found not in used:
            found_problems.append(
                f"{label} offers {_cards(found.node.offered)} to Ray that are emulated, and is "
                "left out because other nodes have real ones."
            )
    for machine in dict.fromkeys(found.machine for found in nodes if not found.error):
        found_problems += _of_machine([n for n in nodes if n.machine == machine], head)
    return found_problems


def usable(nodes: Iterable[NodeCards]) -> list[NodeCards]:
    """The nodes that offer cards; those with emulated ones only if no node has real ones."""
    offering = [found for found in nodes if found.node.offered and found.devices]
    real = [found for found in offering if not found.emulated]
    return real or offering


def _of_machine(nodes: Sequence[NodeCards], head: str) -> list[str]:
    found = nodes[0]
    cards, offered = len(found.devices), sum(other.node.offered for other in nodes)
    words = [
        f"Card {device.qid} of {found.host} is not ready: its status is {device.status}."
        for device in found.devices
        if not device.ready and offered
    ]
    if offered == cards or (found.emulated and not offered):
        return words
    last = nodes[-1]
    mine = max(0, cards - (offered - last.node.offered))
    words.append(
        f"{found.host} ({last.node.address}) has {_cards(cards)} and offers {offered} to Ray: "
        + remedy(last, mine, head)
    )
    return words


def remedy(found: NodeCards, cards: int, head: str = "<head>") -> str:
    """The command that lets a node offer so many cards."""
    to = "--head" if found.node.is_head else f"--address={head}"
    return (
        f"run `ray stop` there, and then `ray start {to} "
        f"--resources='{{\"{CARD_RESOURCE}\": {cards}}}'`."
    )


def _cards(number: int) -> str:
    return "1 card" if number == 1 else f"{number} cards"
