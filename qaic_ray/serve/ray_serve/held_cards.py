"""The cards that one replica holds of its node: as many as Ray gave it, and which ones.

Where Ray chooses the cards of an actor, these are they. Else each replica takes cards that no other
replica of this machine has, by a lock file a card that is apart from the one of who opens it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from qaic_ray.cards.inventory import NodeCards, allot, unit_cards, usable
from qaic_ray.cards.lease import CardLocks
from qaic_ray.errors import DeviceBusy, DeviceError
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts, tries

_SCOPE = "replica"


def hold_cards(
    nodes: Sequence[NodeCards],
    node_id: str,
    number: int,
    *,
    units: Sequence[int] = (),
    among: Sequence[int] | None = None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
) -> tuple[NodeCards, tuple[int, ...], ExitStack]:
    """Take cards of a node.

    Args:
        nodes: all that were looked at.
        node_id: which one.
        number: how many.
        units: Ray's numbers of those that this process has, where Ray chooses.
        among: ids of cards, no other of which is taken; None for all.
        timeouts: `busy_s` and `busy_poll_s` are used: a replica that ends gives its cards back
            soon.

    Returns:
        The node, the ids of the cards, and what gives them back when it is closed.

    Raises:
        DeviceError: the node has no cards that can be used.
        DeviceBusy: others have them.
    """
    here = next((one for one in nodes if one.node.node_id == node_id), None)
    if here is None or here.error or here not in usable(nodes):
        why = "it offers none" if here is None or not here.error else here.error
        raise DeviceError(f"No card of this replica's node can be used ({why}).")
    if here.node.chooses and among is None:
        by_unit = unit_cards(here, nodes)
        return here, tuple(by_unit[unit] for unit in units), ExitStack()
    mine = next(cards for found, cards in allot(usable(nodes), among) if found is here)
    ids = [card.qid for card in mine]
    for is_last in tries(timeouts.busy_s, timeouts.busy_poll_s):
        taken, held = _take(ids, number, f"{_SCOPE}-{here.sdk_root}")
        if len(taken) == number:
            return here, taken, held
        held.close()
        if is_last:
            break
    raise DeviceBusy(
        f"{number} cards of {here.host} are asked for, and other replicas have all but "
        f"{len(taken)} of its {len(ids)}."
    )


def _take(ids: Sequence[int], number: int, scope: str) -> tuple[tuple[int, ...], ExitStack]:
    """As many cards as are free, up to a number."""
    held = ExitStack()
    taken: list[int] = []
    for qid in ids:
        if len(taken) == number:
            break
        locks = CardLocks([qid], scope=scope.replace("/", "-"), what="a replica of the server")
        try:
            locks.acquire()
        except DeviceBusy:
            continue
        held.callback(locks.release)
        taken.append(qid)
    return tuple(taken), held
