"""The cards of every node, and which worker gets which: plain data and pure functions of it.

`look` runs on each node and finds its cards. `problems` names the nodes that offer another number
of cards to Ray than they have, each with the remedy. `place` gives every worker cards of one node;
no node gives more cards than it offers to Ray.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from qaic_ray.cards.lease import Part, card_scope, held_cards
from qaic_ray.compile.store import read_record
from qaic_ray.errors import DeviceError, SdkNotFound, UsageError
from qaic_ray.limits import MAX_CORES
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import Device, boards, find_sdk, qids_text

CARD_RESOURCE = "QAIC"
"""One unit of this Ray resource is one card."""
KEPT_LABEL = "qaic-ray/kept"
"""The node of a Ray that `--keep-ray` left up has this label."""


@dataclass(frozen=True)
class Node:
    """A node as its Ray cluster describes it.

    `offered` is its `QAIC` resource; `is_kept` says whether `--keep-ray` left it up, `chooses`
    whether Ray itself chooses which of a node's cards an actor gets
    (`custom_unit_instance_resources`).
    """

    node_id: str
    address: str
    offered: int
    is_head: bool = False
    is_kept: bool = False
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
        if found.node.offered and found not in used:
            why = " that are emulated, and is left out because other nodes have real ones."
            if found.error:
                why = f", and none can be seen there: {found.error}"
            label = f"{found.host} ({found.node.address})"
            found_problems.append(f"{label} offers {_cards(found.node.offered)} to Ray{why}")
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
        + remedy(last.node, mine, head)
    )
    return words


def remedy(node: Node | None, cards: int | None = None, head: str = "<head>") -> str:
    """How a node comes to offer so many cards; None for one that is not known, or what it has.

    No Ray is to be stopped that may be another's: it is said how who runs it is to start it.
    """
    if node is not None and node.is_kept:
        return (
            "`qaic-ray ray stop` ends this Ray, which is kept, and the next command with "
            "--keep-ray starts one that offers all."
        )
    to = "--head" if node is not None and node.is_head else f"--address={head}"
    there = "on the nodes that have them" if node is None else "there"
    number = "<cards of the node>" if cards is None else cards
    return (
        f"whoever runs Ray {there} is to start it with `ray start {to} "
        f"--resources='{{\"{CARD_RESOURCE}\": {number}}}'`."
    )


def _cards(number: int) -> str:
    return "1 card" if number == 1 else f"{number} cards"


@dataclass(frozen=True, kw_only=True)
class WorkerPlace:
    """Where one worker runs: its node, and its cards or its part of one.

    Where Ray chooses the cards, `device_ids` says only how many, and `choices` maps Ray's unit
    numbers, by position, to ids of cards.
    """

    name: str
    sdk_root: str
    device_ids: tuple[int, ...]
    node_id: str = ""
    part: Part | None = None
    choices: tuple[int, ...] = ()


def place(
    nodes: Sequence[NodeCards],
    *,
    devices: Sequence[int] | None = None,
    group_size: int = 1,
    partitions: int = 1,
    num_cores: int | None = None,
) -> list[WorkerPlace]:
    """One place for each worker, by node and card.

    Args:
        nodes: what was found.
        devices: ids of cards, the same on every machine; None for all that are ready.
        group_size: cards of one worker, for tensor-sliced QPCs: of one node, and of one board where
            that can be.
        partitions: workers of one card, each with as many of its NSPs.
        num_cores: what the QPC was compiled for, where that is known.

    Raises:
        UsageError: for cards that are not there, or cannot be shared out so.
        DeviceError: for cards that are not ready.
    """
    if group_size > 1 and partitions > 1:
        raise UsageError("Parts of cards cannot be grouped: give partitions or a group, not both.")
    places: list[WorkerPlace] = []
    used = usable(nodes)
    several = len({found.machine for found in used}) > 1
    for found, cards in allot(used, devices):
        for card in cards:
            _check_cores(card, partitions, num_cores)
        if len(cards) % group_size and devices is not None:
            raise UsageError(
                f"{len(cards)} cards of {_label(found, used)} cannot be used in groups of "
                f"{group_size}: name as many as fill whole groups."
            )
        where = f" on {_label(found, used)}" if several else ""
        node = found.node
        here = partial(WorkerPlace, node_id=node.node_id, sdk_root=found.sdk_root)
        if partitions > 1:
            for card, number in product(cards, range(1, partitions + 1)):
                part = Part(number, partitions)
                name = f"card {card.qid} {part}, {card.nsp_total // partitions} NSPs{where}"
                places.append(here(name=name, device_ids=(card.qid,), part=part))
            continue
        choices = _choices(found, used) if node.chooses and devices is None else ()
        for group in _groups(cards, group_size):
            name = f"{cards_name(group)}{where}"
            places.append(here(name=name, device_ids=group, choices=choices))
    if not places:
        raise _nothing(nodes, group_size)
    return [
        replace(place, name=f"worker {number}") if place.choices else place
        for number, place in enumerate(places, start=1)
    ]


def _groups(cards: Sequence[Device], size: int) -> list[tuple[int, ...]]:
    """Groups of `size` cards, by their ids, on as few boards as can be: peers are near each other.

    A board's own cards make groups first, or whole boards larger ones; what is left goes together.
    """
    within, left = [], []
    for board in sorted(boards(cards), key=lambda board: (-min(len(board), size), board[0].qid)):
        qids = [device.qid for device in board]
        whole = len(qids) // size * size
        within += qids[:whole]
        left += qids[whole:]
    ids = [*within, *left]
    ends = range(size, len(ids) + 1, size)
    return sorted(tuple(sorted(ids[end - size : end])) for end in ends)


def cards_name(device_ids: Sequence[int]) -> str:
    """`card 3`, `cards 0-3` or `cards 0,2,5`."""
    return f"card{'s' if len(device_ids) > 1 else ''} {qids_text(device_ids)}"


def allot(
    nodes: Sequence[NodeCards], devices: Sequence[int] | None = None
) -> list[tuple[NodeCards, tuple[Device, ...]]]:
    """The cards of each node that are to be used: no more than it offers to Ray.

    The nodes of one machine share its cards out by their ids, always in the same way, so that two
    jobs on a cluster do not mean the same card; what that leaves over goes where there is room.

    Raises:
        UsageError: for ids that are not there, or that no node offers.
        DeviceError: for ids that are not ready.
    """
    result: list[tuple[NodeCards, tuple[Device, ...]]] = []
    for machine in dict.fromkeys(found.machine for found in nodes):
        shares = _shares([found for found in nodes if found.machine == machine])
        known = {device.qid: device for found, _ in shares for device in found.devices}
        wanted = _wanted(known, devices, machine[0])
        chosen = {found.node.node_id: [q for q in own if q in wanted] for found, own in shares}
        left = [q for q in wanted if not any(q in ids for ids in chosen.values())]
        for found, _ in shares:
            ids = chosen[found.node.node_id]
            room = found.node.offered - len(ids)
            ids += left[:room]
            del left[:room]
            result.append((found, tuple(known[qid] for qid in sorted(ids))))
        if left and devices is not None:
            offered = sum(found.node.offered for found, _ in shares)
            raise UsageError(
                f"{len(wanted)} cards of {machine[0]} are asked for and it offers {offered} to "
                f"Ray: {remedy(shares[0][0].node, len(known))}"
            )
    return result


def unit_cards(found: NodeCards, nodes: Iterable[NodeCards]) -> tuple[int, ...]:
    """Ids of a node's cards by Ray's numbers for them, where Ray chooses.

    Args:
        found: the node.
        nodes: all that were looked at; those of its machine share its cards out.
    """
    return _choices(found, usable(nodes))


def qpc_cores(qpc: Path) -> int | None:
    """The NSPs that a QPC was compiled for; None where its folder does not say."""
    record = read_record(qpc)
    return record.num_cores if record and 1 <= record.num_cores <= MAX_CORES else None


def _shares(nodes: Sequence[NodeCards]) -> list[tuple[NodeCards, list[int]]]:
    """The nodes of one machine, each with the ids that are its own by order."""
    start = 0
    shares = []
    for found in sorted(nodes, key=lambda found: found.node.node_id):
        end = start + found.node.offered
        shares.append((found, sorted(device.qid for device in found.devices)[start:end]))
        start = end
    return shares


def _wanted(known: Mapping[int, Device], devices: Sequence[int] | None, host: str) -> list[int]:
    if devices is None:
        return sorted(qid for qid, device in known.items() if device.ready)
    for qid in devices:
        if list(devices).count(qid) > 1:
            raise UsageError(f"Device {qid} is given twice.")
        if qid not in known:
            there = ", ".join(map(str, sorted(known))) or "none"
            raise UsageError(f"There is no device {qid} on {host}: the cards there are {there}.")
        if not known[qid].ready:
            raise DeviceError(
                f"Device {qid} of {host} is not ready: its status is {known[qid].status}."
            )
    return list(devices)


def _choices(found: NodeCards, nodes: Sequence[NodeCards]) -> tuple[int, ...]:
    same = [other for other in nodes if other.machine == found.machine]
    return tuple(next(ids for other, ids in _shares(same) if other is found))


def _check_cores(card: Device, partitions: int, num_cores: int | None) -> None:
    share = card.nsp_total // partitions
    if not share:
        raise UsageError(
            f"Card {card.qid} has {card.nsp_total} NSPs: that is not enough for {partitions} "
            "partitions."
        )
    if num_cores is None or num_cores <= share:
        return
    has, remedy = f"card {card.qid} has {share}", ""
    if partitions > 1:
        has = f"a partition of card {card.qid} has {share} (1/{partitions} of {card.nsp_total})"
        remedy = ", or use fewer partitions"
    raise UsageError(
        f"The QPC was compiled for {num_cores} NSPs and {has}: compile with --num-cores "
        f"{share}{remedy}."
    )


def _nothing(nodes: Sequence[NodeCards], group_size: int) -> DeviceError:
    if not any(found.node.offered for found in nodes):
        kept = next((found.node for found in nodes if found.node.is_kept), None)
        return DeviceError(f"No node of the Ray cluster offers cards: {remedy(kept)}")
    errors = [f"{found.host}: {found.error}" for found in nodes if found.error]
    number = sum(len(found.devices) for found in usable(nodes))
    why = "; ".join(errors) or f"{number} found, and none, or no {group_size} of a node, are ready"
    return DeviceError(f"No card of the cluster can be used ({why}).")


def _label(found: NodeCards, nodes: Iterable[NodeCards]) -> str:
    """The machine's name, or its address where another has the same name."""
    same = {other.machine for other in nodes if other.host == found.host}
    return found.host if len(same) == 1 else found.node.address
