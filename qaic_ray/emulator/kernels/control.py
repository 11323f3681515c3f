"""Numbers, loops, branches and functions for `emit`, so that a program reads like one.

A `Num` is an int64 with Python's operators; a `Function` is compiled once into the module of
whoever calls it first. What branches and loops change lives in a `Variable`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Sequence, Union

from llvmlite import ir

from .emit import F32, I64, Emitter

Operand = Union["Num", int]


class Num:
    """An int64, or a truth; division is of numbers without sign."""

    def __init__(self, emit: Emitter, value: Any) -> None:
        self.emit = emit
        self.value = value

    def _raw(self, other: Operand) -> Any:
        return other.value if isinstance(other, Num) else I64(other)

    def __add__(self, other: Operand) -> Num:
        return Num(self.emit, self.emit.builder.add(self.value, self._raw(other)))

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Num:
        return Num(self.emit, self.emit.builder.sub(self.value, self._raw(other)))

    def __mul__(self, other: Operand) -> Num:
        return Num(self.emit, self.emit.builder.mul(self.value, self._raw(other)))

    __rmul__ = __mul__

    def __floordiv__(self, other: Operand) -> Num:
        return Num(self.emit, self.emit.builder.udiv(self.value, self._raw(other)))

    def __mod__(self, other: Operand) -> Num:
        return Num(self.emit, self.emit.builder.urem(self.value, self._raw(other)))

    def _compare(self, relation: str, other: Operand) -> Num:
        made = self.emit.builder.icmp_signed(relation, self.value, self._raw(other))
        return Num(self.emit, made)

    def __lt__(self, other: Operand) -> Num:
        return self._compare("<", other)

    def __le__(self, other: Operand) -> Num:
        return self._compare("<=", other)

    def __gt__(self, other: Operand) -> Num:
        return self._compare(">", other)

    def __ge__(self, other: Operand) -> Num:
        return self._compare(">=", other)

    def equals(self, other: Operand) -> Num:
        """Whether both are the same number."""
        return self._compare("==", other)

    def __and__(self, other: Num) -> Num:
        return Num(self.emit, self.emit.builder.and_(self.value, other.value))

    def __or__(self, other: Num) -> Num:
        return Num(self.emit, self.emit.builder.or_(self.value, other.value))

    def equals_false(self) -> Num:
        """Of a truth, whether it does not hold."""
        return Num(self.emit, self.emit.builder.not_(self.value))

    def pick(self, yes: Operand, no: Operand) -> Num:
        """Of a truth, one of two numbers."""
        made = self.emit.builder.select(self.value, self._raw(yes), self._raw(no))
        return Num(self.emit, made)

    def at_most(self, other: Operand) -> Num:
        """The smaller of both."""
        return (self < other).pick(self, other)


class Variable:
    """A number that changes."""

    def __init__(self, emit: Emitter, first: Operand) -> None:
        self._emit = emit
        with emit.builder.goto_entry_block():
            self._place = emit.builder.alloca(I64)
        self.set(first)

    def get(self) -> Num:
        """What it is now."""
        return Num(self._emit, self._emit.builder.load(self._place))

    def set(self, value: Operand) -> None:
        """Change it."""
        raw = value.value if isinstance(value, Num) else I64(value)
        self._emit.builder.store(raw, self._place)


class FloatSum:
    """A float32 that is added to."""

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        with emit.builder.goto_entry_block():
            self._place = emit.builder.alloca(F32)
        emit.builder.store(F32(0.0), self._place)

    def get(self) -> Any:
        """What it is now."""
        return self._emit.builder.load(self._place)

    def add(self, value: Any) -> None:
        """Add a float32."""
        self._emit.builder.store(self._emit.builder.fadd(self.get(), value), self._place)


@contextmanager
def accumulate(emit: Emitter) -> Iterator[FloatSum]:
    """A sum that begins with nothing here."""
    yield FloatSum(emit)


@contextmanager
def when(condition: Num) -> Iterator[None]:
    """What is written inside runs where a truth holds."""
    with condition.emit.builder.if_then(condition.value):
        yield


def choose(selector: Num, cases: Sequence[Any], last: Callable[[], None]) -> None:
    """Run the case whose number the selector is, `last` where it is none: (number, what)."""
    builder = selector.emit.builder
    after = builder.append_basic_block("chosen")
    default = builder.append_basic_block("default")
    switch = builder.switch(selector.value, default)
    for number, run in cases:
        block = builder.append_basic_block(f"case_{number}")
        switch.add_case(I64(number), block)
        builder.position_at_end(block)
        run()
        builder.branch(after)
    builder.position_at_end(default)
    last()
    builder.branch(after)
    builder.position_at_end(after)


@contextmanager
def repeat(emit: Emitter, condition: Callable[[], Num]) -> Iterator[None]:
    """What is written inside runs as long as a truth holds, which is asked for before each time."""
    builder = emit.builder
    ask, inside = builder.append_basic_block("ask"), builder.append_basic_block("inside")
    after = builder.append_basic_block("after")
    builder.branch(ask)
    builder.position_at_end(ask)
    builder.cbranch(condition().value, inside, after)
    builder.position_at_end(inside)
    yield
    builder.branch(ask)
    builder.position_at_end(after)


@contextmanager
def span(emit: Emitter, first: Operand, last: Operand, step: int = 1) -> Iterator[Num]:
    """Run what is written inside for `first` to below `last`."""
    place = Variable(emit, first)
    with repeat(emit, lambda: place.get() < last):
        yield place.get()
        place.set(place.get() + step)


class Function:
    """A function of int64 arguments that gives nothing back.

    Args:
        name: of its own in the module.
        num_arguments: how many.
        build: writes it, given an emitter and the arguments.
    """

    def __init__(self, name: str, num_arguments: int, build: Callable[..., None]) -> None:
        self.name = name
        self._num_arguments = num_arguments
        self._build = build

    def define(self, module: Any) -> Any:
        """The function in a module, written where it is not there yet."""
        if self.name in module.globals:
            return module.globals[self.name]
        kind = ir.FunctionType(ir.VoidType(), [I64] * self._num_arguments)
        made = ir.Function(module, kind, self.name)
        made.linkage = "internal"
        made.attributes.add("nounwind")
        builder = ir.IRBuilder(made.append_basic_block("entry"))
        emit = Emitter(builder)
        self._build(emit, *(Num(emit, argument) for argument in made.args))
        builder.ret_void()
        return made

    def __call__(self, emit: Emitter, *arguments: Operand) -> None:
        """Call it."""
        raw = [a.value if isinstance(a, Num) else I64(a) for a in arguments]
        emit.builder.call(self.define(emit.builder.module), raw)


def function(name: str) -> Callable[[Callable[..., None]], Function]:
    """Make a function of what writes it; its arguments are those after the emitter."""

    def made(build: Callable[..., None]) -> Function:
        return Function(name, build.__code__.co_argcount - 1, build)

    return made


def read(emit: Emitter, address: Num, offset: int = 0) -> Num:
    """An int64 from memory."""
    return Num(emit, emit.load(I64, (address + offset).value, 8))


def columns(emit: Emitter, row: Num, numbers: Sequence[int]) -> List[Num]:
    """Columns of a row of int64."""
    return [read(emit, row, 8 * number) for number in numbers]
