"""Every time-out and interval of a run outside the dispatcher, each in seconds.

What the dispatcher decides by time is in its `Policy`. Files that also run as programs, by their
path (`cluster/ray_session.py`, `guard.py`), have polling intervals of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Timeouts:
    """All values are seconds. Plain data that goes to other processes with a worker's spec."""

    # -- the Ray cluster
    probe_s: float = 5.0
    """An address that is given answers within this, or nothing is there."""
    shutdown_s: float = 10.0
    """`ray.shutdown` is abandoned after this. It takes seven seconds when the head is gone, and may
    hang for ever."""
    keeper_s: float = 30.0
    """The keeper of a Ray that we started tries so long to end what is left of it, and then as long
    again to remove its folder."""
    keeper_wait_s: float = 40.0
    """The keeper's own end is waited for so long."""
    session_s: float = 60.0
    """A session folder without a lock file that is older than this was left by a killed process."""
    watch_s: float = 0.5
    """Interval at which the driver looks whether its Ray is gone."""
    ask_s: float = 3.0
    """Interval at which a joined cluster's head is asked whether it answers."""
    silent_s: float = 30.0
    """A head that does not answer for this is lost. Ray itself ends its driver after 60, without a
    word."""
    look_s: float = 60.0
    """Every node has told of its cards within this."""
    busy_s: float = 20.0
    """Cards of the cluster that others hold are waited for so long."""
    busy_poll_s: float = 0.1
    """Interval at which those cards are looked at."""
    cancel_s: float = 5.0
    """Compile tasks that are cancelled may take this to end what they started."""

    # -- actors
    steps_s: float = 1.0
    """Interval at which each worker is asked for its engine's steps; longer with very many."""
    close_s: float = 5.0
    """Workers that are asked to close, or for their measurements, answer within this."""
    kill_s: float = 2.0
    """Killing the actors may take this, after `close_s`."""
    parent_s: float = 1.0
    """Interval at which an actor looks whether its raylet still lives."""

    # -- jobs handed to a cluster
    agent_s: float = 60.0
    """A head that has just started can take jobs within this."""
    agent_poll_s: float = 1.0
    """Interval at which handing a job in is tried again."""
    stop_s: float = 20.0
    """A job that is stopped is waited for so long."""
    poll_s: float = 0.2
    """Interval at which a job that stops, a card that gets ready, or cards that a `CardPredictor`
    could have are looked at."""

    # -- cards
    choose_s: float = 30.0
    """A `CardPredictor` waits so long for a card that nobody holds."""
    lock_s: float = 20.0
    """A card may be held so long by whoever had it before the worker."""
    lock_poll_s: float = 0.1
    """Interval at which a card's lock is tried again."""
    cool_down_s: float = 5.0
    """A real card is left alone for this after its process died, as in the vendor's scheduler."""
    ready_s: float = 30.0
    """After that it may take this to be ready, with its NSPs and DRAM free."""

    # -- the worker
    gather_s: float = 0.05
    """Rows that finish within this go to the driver together: a batch of rows costs the driver
    about as much as ten rows do."""
    again_s: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Pauses before a step that the runtime refused with QS_AGAIN is tried again; one each."""

    # -- metrics. Ray forgets a gauge that nobody has set for two of its export intervals, 20 s.
    record_engine_s: float = 1.0
    """Interval at which a worker looks at its engine."""
    record_cards_s: float = 10.0
    """Interval at which one worker of a node asks for its cards."""
    record_run_s: float = 5.0
    """Interval at which the driver's gauges are set again where nothing happens."""

    # -- the driver
    read_poll_s: float = 0.02
    """Interval at which the input is looked at while it has not given what was asked for."""
    read_stall_s: float = 0.05
    """Prompts that were read are handed over when no more has come for this."""
    read_gather_s: float = 1.0
    """They are handed over so long after they were asked for, even if more keeps coming."""
    commit_s: float = 0.05
    """Rows are gathered at least this long before they are written to the disk together."""

    looked_at_s: float = 0.2
    """A run folder's lock is tried for this; who only looks whether the run goes on holds it for an
    instant (`inspect/holder.py`)."""

    power_s: float = 15.0
    """Interval at which the power of this machine's boards is asked for, for the report."""

    # -- the compiler
    compile_s: float = 6 * 3600.0
    """A compiler that runs longer is stopped. A 70B model takes hours on the real one."""
    guard_s: float = 10.0
    """The guard of a compiler or of onnxsim, told to end, is gone within this."""


DEFAULT_TIMEOUTS = Timeouts()


def changed_values(settings: Any) -> dict[str, object]:
    """The fields of a run's time-outs, or of a dispatcher's policy, that are not the default."""
    values = ((field, getattr(settings, field.name)) for field in fields(settings))
    return {field.name: value for field, value in values if value != field.default}


def tries(timeout_s: float, pause_s: float) -> Iterator[bool]:
    """Yield for each try, with a pause between two: whether it is the last one, after the time."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        yield False
        time.sleep(pause_s)
    yield True
