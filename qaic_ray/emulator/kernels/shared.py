"""What threads of a step share: counters in memory, and waiting for each other.

Whoever waits turns a few microseconds on the spot, then lets others have the core, then sleeps: a
thread that lost its core to another process gets one, and nobody is starved.
"""

from __future__ import annotations

import platform

from llvmlite import ir

from .control import Num, Variable, function, repeat, when
from .emit import I32, I64, Emitter

_SPINS = 2000
_YIELDS = 20
_SLEEP_US = 30


def fetch_add(emit: Emitter, address: Num, amount: int) -> Num:
    """Add to an int64 at once for all threads; what was there before."""
    pointer = emit.builder.inttoptr(address.value, I64.as_pointer())
    return Num(emit, emit.builder.atomic_rmw("add", pointer, I64(amount), "seq_cst"))


@function("wait_for")
def wait_for(emit: Emitter, address: Num, total: Num) -> None:
    """Wait until a counter has reached `total`."""
    turns = Variable(emit, 0)

    def is_behind() -> Num:
        pointer = emit.builder.inttoptr(address.value, I64.as_pointer())
        return Num(emit, emit.builder.load_atomic(pointer, "acquire", 8)) < total

    with repeat(emit, is_behind):
        turn = turns.get()
        turns.set(turn + 1)
        with when(turn < _SPINS):
            if platform.machine() in ("x86_64", "AMD64"):
                emit.call("llvm.x86.sse2.pause", ir.VoidType(), [])
        with when((turn >= _SPINS) & (turn < _SPINS + _YIELDS)):
            emit.call("sched_yield", I32, [])
        with when(turn >= _SPINS + _YIELDS):
            emit.call("usleep", I32, [I32(_SLEEP_US)])
