"""Vector code: LLVM's own language, written with Python's operators.

A loop becomes vectors where a compiler sees fit; these are vectors by construction, on any
processor that LLVM knows. A value is `Vec`, 16 float32 or 16 int32; addresses are int64 values.
"""

from __future__ import annotations

from typing import Any, Callable, List, Sequence

from llvmlite import ir

I8, I16, I32, I64, F32, F16 = (
    ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.HalfType()
)  # fmt: skip
LANES = 16
FLOATS = ir.VectorType(F32, LANES)
HALVES = ir.VectorType(F16, LANES)
INTS = ir.VectorType(I32, LANES)
BYTES = ir.VectorType(I8, 64)
VECTOR_BYTES = 64

_LN2_HIGH, _LN2_LOW, _LOG2_E = 0.693359375, -2.12194440e-4, 1.44269504088896341
_LOWEST_EXP, _HIGHEST_EXP = -87.3, 88.7


def splat(kind: Any, value: Any) -> Any:
    """A constant vector of one number, or of a sequence of them."""
    values = value if isinstance(value, (list, tuple)) else [value] * kind.count
    return ir.Constant(kind, [ir.Constant(kind.element, v) for v in values])


class Vec:
    """A vector of float32 with operators; numbers beside it are meant for every lane."""

    def __init__(self, emit: Emitter, value: Any) -> None:
        self.emit = emit
        self.value = value

    def _other(self, other: Any) -> Any:
        return other.value if isinstance(other, Vec) else splat(FLOATS, float(other))

    def __add__(self, other: Any) -> Vec:
        return Vec(self.emit, self.emit.builder.fadd(self.value, self._other(other)))

    def __sub__(self, other: Any) -> Vec:
        return Vec(self.emit, self.emit.builder.fsub(self.value, self._other(other)))

    def __mul__(self, other: Any) -> Vec:
        return Vec(self.emit, self.emit.builder.fmul(self.value, self._other(other)))

    def __truediv__(self, other: Any) -> Vec:
        return Vec(self.emit, self.emit.builder.fdiv(self.value, self._other(other)))

    def __rtruediv__(self, other: Any) -> Vec:
        return Vec(self.emit, self.emit.builder.fdiv(self._other(other), self.value))

    def __neg__(self) -> Vec:
        return Vec(self.emit, self.emit.builder.fneg(self.value))


class Emitter:
    """What kernels are made of; one for each intrinsic."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def call(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """Call one of LLVM's intrinsics."""
        module = self.builder.module
        if name not in module.globals:
            kind = ir.FunctionType(result, [a.type for a in arguments])
            ir.Function(module, kind, name)
        return self.builder.call(module.globals[name], list(arguments))

    def at(self, base: Any, *offsets: Any) -> Any:
        """An address: `base` and offsets in bytes, numbers or values."""
        for offset in offsets:
            if not isinstance(offset, int):
                base = self.builder.add(base, offset)
            elif offset:
                base = self.builder.add(base, I64(offset))
        return base

    def times(self, value: Any, factor: int) -> Any:
        """An int64 value times a number."""
        return self.builder.mul(value, I64(factor))

    def load(self, kind: Any, address: Any, align: int = 4) -> Any:
        """The value of a type at an address."""
        loaded = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        loaded.align = align
        return loaded

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        """Write a value (or a `Vec`) to an address."""
        value = value.value if isinstance(value, Vec) else value
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer).align = align

    def vec(self, address: Any) -> Vec:
        """16 float32 from memory."""
        return Vec(self, self.load(FLOATS, address))

    def every(self, value: Any, kind: Any = FLOATS) -> Any:
        """A vector with one scalar in every lane."""
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, I32(0))
        lanes = splat(ir.VectorType(I32, kind.count), 0)
        return self.builder.shuffle_vector(first, undefined, lanes)

    def shuffle(self, one: Any, other: Any, lanes: Sequence[int]) -> Any:
        """Lanes of two vectors, numbered through."""
        kind = ir.VectorType(I32, len(lanes))
        return self.builder.shuffle_vector(one, other, splat(kind, list(lanes)))

    def fma(self, one: Any, other: Any, addend: Any) -> Any:
        """one * other + addend, rounded once."""
        return self.call("llvm.fma.v16f32", FLOATS, [one, other, addend])

    def rint(self, value: Vec) -> Vec:
        """To the nearest integer, ties to even."""
        return Vec(self, self.call("llvm.nearbyint.v16f32", FLOATS, [value.value]))

    def magnitude(self, value: Vec) -> Vec:
        """|value|."""
        return Vec(self, self.call("llvm.fabs.v16f32", FLOATS, [value.value]))

    def larger(self, one: Vec, other: Vec) -> Vec:
        """The larger one, `one` where they are not ordered."""
        less = self.builder.fcmp_ordered("<", one.value, other.value)
        return Vec(self, self.builder.select(less, other.value, one.value))

    def within(self, value: Vec, low: float, high: float) -> Vec:
        """Cut to a range; what is no number stays none."""
        builder, result = self.builder, value.value
        for relation, bound in (("<", low), (">", high)):
            limit = splat(FLOATS, bound)
            result = builder.select(builder.fcmp_ordered(relation, result, limit), limit, result)
        return Vec(self, result)

    def exp(self, value: Vec) -> Vec:
        """e ** value to 2 units in the last place; cut where it would leave float32's range."""
        value = self.within(value, _LOWEST_EXP, _HIGHEST_EXP)
        power = self.rint(value * _LOG2_E)
        rest = value - power * _LN2_HIGH - power * _LN2_LOW
        # The series of e ** rest; |rest| <= ln(2) / 2, so what is left out is below 6e-9.
        result = Vec(self, splat(FLOATS, 1 / 5040))
        for factorial in (720, 120, 24, 6, 2, 1, 1):
            result = Vec(self, self.fma(result.value, rest.value, splat(FLOATS, 1 / factorial)))
        exponent = self.builder.add(self.builder.fptosi(power.value, INTS), splat(INTS, 127))
        scale = self.builder.bitcast(self.builder.shl(exponent, splat(INTS, 23)), FLOATS)
        return result * Vec(self, scale)

    def total(self, value: Vec) -> Any:
        """The sum of the lanes, as a tree; a scalar."""
        return self._folded(value, lambda one, other: one + other)

    def largest(self, value: Vec) -> Any:
        """The largest of the lanes; a scalar."""
        return self._folded(value, self.larger)

    def _folded(self, value: Vec, join: Callable[[Vec, Vec], Vec]) -> Any:
        width = LANES // 2
        while width:
            lanes = [(i + width) % LANES for i in range(LANES)]
            other = self.shuffle(value.value, value.value, lanes)
            value, width = join(value, Vec(self, other)), width // 2
        return self.builder.extract_element(value.value, I32(0))

    def loop(
        self, count: Any, carried: Sequence[Any], body: Callable[[Any, List[Any]], Sequence[Any]]
    ) -> List[Any]:
        """Run `body(index, values)` for 0 to count - 1, at least once; returns the last values."""
        builder = self.builder
        before, inside = builder.block, builder.append_basic_block("loop")
        after = builder.append_basic_block("end")
        builder.branch(inside)
        builder.position_at_end(inside)
        index = builder.phi(I64)
        index.add_incoming(I64(0), before)
        values = [builder.phi(v.type) for v in carried]
        for phi, first in zip(values, carried):
            phi.add_incoming(first, before)
        made = list(body(index, values))
        following = builder.add(index, I64(1))
        index.add_incoming(following, builder.block)
        for phi, value in zip(values, made):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
        builder.position_at_end(after)
        return made
