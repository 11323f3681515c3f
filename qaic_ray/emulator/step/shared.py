"""What threads of a step share: counters in memory, and waiting for each other.

Whoever waits turns a few microseconds on the spot, then lets others have the core, then sleeps: a
thread that lost its core to another process gets one, and nobody is starved.
"""

from __future__ import annotations

import platform
from typing import Any, Tuple

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .emit import F32, I32, I64, Emitter

_SPINS = 2000
_YIELDS = 20
_SLEEP_US = 30


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(_typing: Any, address: Any, amount: Any) -> Tuple[Any, Any]:
    """Add to an int64 at once for all threads; what was there before."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _read(_typing: Any, address: Any) -> Tuple[Any, Any]:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pause(_typing: Any) -> Tuple[Any, Any]:
    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            Emitter(builder).call("llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def _rest(_typing: Any, microseconds: Any) -> Tuple[Any, Any]:
    """Let others run: `sched_yield` for 0, else a sleep."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit, short = Emitter(builder), builder.trunc(args[0], I32)
        with builder.if_else(builder.icmp_signed("==", short, I32(0))) as (now, later):
            with now:
                emit.call("sched_yield", I32, [])
            with later:
                emit.call("usleep", I32, [short])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(nogil=True)  # type: ignore[untyped-decorator]
def wait_for(address: int, total: int) -> None:
    """Wait until a counter has reached `total`."""
    turns = 0
    while _read(address) < total:
        turns += 1
        if turns < _SPINS:
            _pause()
        elif turns < _SPINS + _YIELDS:
            _rest(0)
        else:
            _rest(_SLEEP_US)


def _scalar(kind: Any, numba_kind: Any) -> Tuple[Any, Any]:
    """Intrinsics that read and write one number at an address."""

    @intrinsic  # type: ignore[untyped-decorator]
    def get(_typing: Any, address: Any) -> Tuple[Any, Any]:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return Emitter(builder).load(kind, args[0])

        return numba_kind(types.int64), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def put(_typing: Any, address: Any, value: Any) -> Tuple[Any, Any]:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            Emitter(builder).store(args[1], args[0])
            return context.get_dummy_value()

        return types.void(types.int64, numba_kind), generate

    return get, put


get_float, put_float = _scalar(F32, types.float32)
get_int, put_int = _scalar(I64, types.int64)


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(_typing: Any, bits: Any) -> Tuple[Any, Any]:
    """The float32 that an int64's low half spells."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], I32), F32)

    return types.float32(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def get_half(_typing: Any, address: Any) -> Tuple[Any, Any]:
    """A float16 at an address, as float32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fpext(Emitter(builder).load(ir.HalfType(), args[0], 2), F32)

    return types.float32(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def put_half(_typing: Any, address: Any, value: Any) -> Tuple[Any, Any]:
    """Write a float32 to an address as float16."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        Emitter(builder).store(builder.fptrunc(args[1], ir.HalfType()), args[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate
