"""The interface of an exported model and of its QPC: tensor names, I/O contracts, specializations.

Vendor words are kept exactly. Sources: the published LlamaForCausalLM recipe (`cache-index`) and
QEfficient from 1.16 on (`position-ids`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qaic_ray.errors import SpecializationError
from qaic_ray.files.documents import parse_json, read_text, shown

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
BATCH_INDEX = "batch_index"
ATTENTION_MASK = "attention_mask"
CACHE_INDEX = "cache_index"
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
COMP_CTX_LENGTHS = "comp_ctx_lengths"
LOGITS = "logits"
NEXT_TOKENS = "next_tokens"
RETAINED_SUFFIX = "_RetainedState"

PADDING_POSITION = -1
"""`position_ids` of a padding token in the `position-ids` contract."""

MAX_SIZE = 2**31 - 1
"""The largest dimension: what 32 bits hold."""
MAX_VARIANTS = 1000
"""Variants of one grid at most; also specializations of one file."""

COMP_CTX_STEP = 32
"""A compute-context length that has to avoid another one is a multiple of this."""


class IoContract(str, Enum):
    """Which of the two public interfaces a graph has."""

    POSITION_IDS = "position-ids"
    CACHE_INDEX = "cache-index"


def past_key(layer: int) -> str:
    """Input name of the key cache of a layer."""
    return f"past_key.{layer}"


def past_value(layer: int) -> str:
    """Input name of the value cache of a layer."""
    return f"past_value.{layer}"


def past_names(num_layers: int) -> list[str]:
    """Key and value cache inputs, interleaved per layer, in graph order."""
    return [name for i in range(num_layers) for name in (past_key(i), past_value(i))]


def retained(name: str) -> str:
    """Output name of the state that stays on the card for input `name`."""
    return name + RETAINED_SUFFIX


def is_past(name: str) -> bool:
    """Whether a binding is a KV cache input or its retained output."""
    return name.startswith(("past_key.", "past_value."))


@dataclass(frozen=True)
class Specialization:
    """One static shape of a program.

    `batch_size` rows of `seq_len` tokens at once, each with a context of `ctx_len` tokens.
    `full_batch_size` is the number of slots of a continuous-batching program, whose prefill usually
    has a `batch_size` of 1 and whose decode has all of them; None for a static one.
    `num_logits_to_keep` and `comp_ctx_lengths` are for graphs that have such inputs: of how many
    tokens of a row there are logits, and how many positions a run computes with and stays below.
    """

    batch_size: int
    seq_len: int
    ctx_len: int
    full_batch_size: int | None = None
    num_logits_to_keep: int | None = None
    comp_ctx_lengths: int | None = None

    @property
    def is_decode(self) -> bool:
        """Whether every one of its tokens has logits: one token a row, or several (speculative)."""
        return self.seq_len == (self.num_logits_to_keep or 1)

    @property
    def reach(self) -> int:
        """Positions that it can compute: those from 0 to below this."""
        return self.comp_ctx_lengths or self.ctx_len

    def symbols(self) -> dict[str, str]:
        """ONNX dim_param -> value, as strings: the compiler's JSON reader takes nothing else."""
        values = {key: getattr(self, key) for key in SYMBOLS}
        return {key: str(value) for key, value in values.items() if value is not None}


SYMBOLS = tuple(field.name for field in fields(Specialization))
"""The fields of a specialization; the first three are always there."""


@dataclass(frozen=True)
class Specializations:
    """The prefill and decode shapes of one QPC.

    A QPC has at least one decode shape; several differ in `comp_ctx_lengths`, or one is for
    speculation (several tokens a row, logits of each) beside another of one token. It may have
    several prefill shapes, or none (`pl1`).

    Raises:
        SpecializationError: on construction, where the shapes cannot live in one program.
    """

    entries: tuple[Specialization, ...]

    def __post_init__(self) -> None:
        check_specializations(self.entries)

    @property
    def prefills(self) -> tuple[Specialization, ...]:
        """The prefill shapes by rising `seq_len`, then `comp_ctx_lengths`; none of a `pl1`."""
        return tuple(sorted((s for s in self.entries if not s.is_decode), key=_size))

    @property
    def decodes(self) -> tuple[Specialization, ...]:
        """The decode shapes by rising `seq_len`, then `comp_ctx_lengths`."""
        return tuple(sorted((s for s in self.entries if s.is_decode), key=_size))

    @property
    def prefill(self) -> Specialization:
        """The longest prefill shape; the decode one where there is none."""
        return (self.prefills or self.decodes)[-1]

    @property
    def decode(self) -> Specialization:
        """The decode shape with the fewest tokens a row, and of those the longest context."""
        return max(self.decodes, key=lambda s: (-s.seq_len, s.reach))

    @property
    def prompt_len(self) -> int:
        """Tokens of one prefill chunk at most; 1 where there is no prefill shape."""
        return self.prefills[-1].seq_len if self.prefills else 1

    @property
    def decode_len(self) -> int:
        """Tokens of a row in the longest decode shape: 1, or more where it is for speculation."""
        return self.decodes[-1].seq_len

    @property
    def ctx_len(self) -> int:
        """Tokens, prompt and answer together, that one row can hold."""
        return self.entries[0].ctx_len

    @property
    def batch_size(self) -> int:
        """Rows decoded at once: slots of a continuous-batching program, rows of a static one."""
        return self.decode.full_batch_size or self.decode.batch_size

    @property
    def continuous(self) -> bool:
        """Whether rows have slots of their own that are refilled while others run."""
        return self.entries[0].full_batch_size is not None

    @classmethod
    def build(
        cls,
        *,
        batch_size: int,
        prompt_len: int | Sequence[int],
        ctx_len: int,
        continuous: bool,
        num_logits_to_keep: bool = False,
        num_speculative_tokens: int = 0,
        comp_ctx_lengths: Sequence[int] = (),
    ) -> Specializations:
        """The usual shapes: a prefill one per length over 1, and a decode one per context.

        Args:
            batch_size: rows, or slots.
            prompt_len: tokens of a prefill; 1 alone makes a decode-only program.
            ctx_len: tokens of a row's context.
            continuous: whether rows have slots of their own.
            num_logits_to_keep: whether the graph has that input; it has for speculation.
            num_speculative_tokens: tokens guessed ahead in a decode step, beside the known one.
            comp_ctx_lengths: of the decode shapes; `ctx_len` is among them in any case. No prefill
                shape may share a decode shape's value, says the compiler, so the prefill ones have
                the next lower multiple of 32 below `ctx_len`: a prompt's positions beyond it are
                for the decode shapes.
        """
        slots = batch_size if continuous else None
        length = 1 + num_speculative_tokens
        first, each = (1, length) if num_logits_to_keep or length > 1 else (None, None)
        lens = {prompt_len} if isinstance(prompt_len, int) else set(prompt_len)
        contexts = sorted({*comp_ctx_lengths, ctx_len}) if comp_ctx_lengths else [None]
        below = _free_context(ctx_len, comp_ctx_lengths) if comp_ctx_lengths else None
        prefills = [
            Specialization(1 if continuous else batch_size, seq_len, ctx_len, slots, first, below)
            for seq_len in sorted(lens - {1})
        ]
        decodes = [
            Specialization(batch_size, length, ctx_len, slots, each, context)
            for context in contexts
        ]
        return cls((*prefills, *decodes))

    def with_prefill_rows(self, rows: int) -> Specializations:
        """The same shapes with so many rows in each prefill, of a continuous-batching program."""
        entries = (s if s.is_decode else replace(s, batch_size=rows) for s in self.entries)
        return Specializations(tuple(entries))

    def to_json(self, *, named: bool) -> str:
        """The compiler's file: flat for the SDKs up to 1.21, `{name, symbols}` from 1.22 on."""
        entries: list[Any] = [s.symbols() for s in self.entries]
        if named:
            entries = [
                {"name": name, "symbols": symbols}
                for name, symbols in zip(self._names(), entries, strict=True)
            ]
        return json.dumps({"specializations": entries}, indent=2) + "\n"

    def _names(self) -> list[str]:
        """`Prefill` and `Decode`, numbered from 0 where there are several."""
        kinds = ["Decode" if s.is_decode else "Prefill" for s in self.entries]
        return [
            f"{kind}_{kinds[:index].count(kind)}" if kinds.count(kind) > 1 else kind
            for index, kind in enumerate(kinds)
        ]

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Specializations:
        """Read either form; `source` names the file in errors."""
        document = parse_json(text, source, raises=SpecializationError)
        entries = document.get("specializations") if isinstance(document, dict) else None
        if not isinstance(entries, list) or not entries:
            raise SpecializationError(
                f"{source} must be an object whose 'specializations' is a list with one entry for "
                "prefill and one for decode."
            )
        read = (_entry(entry, source, i) for i, entry in enumerate(entries))
        return cls(tuple(islice(read, MAX_VARIANTS + 1)))

    @classmethod
    def load(cls, path: Path) -> Specializations:
        """Read a specializations.json."""
        return cls.from_json(read_text(path, raises=SpecializationError), source=str(path))


_NUMBER = re.compile(r"\s*-?[0-9]{1,18}\s*", re.ASCII)

_ALSO_CALLED = {
    **dict.fromkeys(("prompt_length", "prompt_len", "input_len"), "seq_len"),
    **dict.fromkeys(("context_length", "context_len"), "ctx_len"),
}
"""What the published recipe's text calls the keys; its compiler knows only the other names."""


def _entry(entry: Any, source: str, index: int) -> Specialization:
    symbols = entry.get("symbols", entry) if isinstance(entry, dict) else None
    if not isinstance(symbols, dict):
        raise SpecializationError(f"{source}: specialization {index} must be an object.")
    values: dict[str, int] = {}
    for given, value in symbols.items():
        if given in ("name", "full_batch_exec_size"):
            continue
        key = _ALSO_CALLED.get(given, given)
        if key in values:
            raise SpecializationError(
                f"{source}: specialization {index} says {key} twice, once as {shown(given)}: leave "
                "one of them out."
            )
        if key not in SYMBOLS:
            raise SpecializationError(
                f"{source}: specialization {index} has the unknown key {shown(key)}; "
                f"use {', '.join(SYMBOLS)}."
            )
        if type(value) is not int and not (isinstance(value, str) and _NUMBER.fullmatch(value)):
            raise SpecializationError(
                f"{source}: {key} of specialization {index} must be a whole number, not "
                f"{shown(value)}."
            )
        values[key] = int(value)
    missing = [key for key in SYMBOLS[:3] if key not in values]
    if missing:
        raise SpecializationError(
            f"{source}: specialization {index} lacks {' and '.join(missing)}."
        )
    return Specialization(**values)


def _size(shape: Specialization) -> tuple[int, int]:
    return shape.seq_len, shape.reach


def _free_context(ctx_len: int, taken: Sequence[int]) -> int:
    """The highest multiple of 32 below a context that is not taken, or any other number."""
    steps = range((ctx_len - 1) // COMP_CTX_STEP * COMP_CTX_STEP, 0, -COMP_CTX_STEP)
    return next((n for n in chain(steps, range(ctx_len - 1, 0, -1)) if n not in taken), 0)


def check_specializations(entries: tuple[Specialization, ...]) -> None:
    """Refuse specializations that cannot be in one program, before the compiler finds out.

    Raises:
        SpecializationError: naming the key, the values and the rule.
    """
    if not 1 <= len(entries) <= MAX_VARIANTS:
        raise SpecializationError(
            f"There must be 1 to {MAX_VARIANTS} specializations, not {len(entries)}."
        )
    for s in entries:
        _check_one(s)
    for key in ("ctx_len", "full_batch_size"):
        _check_equal(key, entries)
    for key in (NUM_LOGITS_TO_KEEP, COMP_CTX_LENGTHS):
        if len({getattr(s, key) is None for s in entries}) > 1:
            raise SpecializationError(
                f"{key} must be in every specialization or in none: it is an input of the graph."
            )
    decodes = [s for s in entries if s.is_decode]
    prefills = [s for s in entries if not s.is_decode]
    if not decodes:
        lengths = ", ".join(str(s.seq_len) for s in entries[:8])
        raise SpecializationError(
            "At least one specialization must be a decode one, with seq_len 1 (or with as many "
            f"num_logits_to_keep, for speculation); seq_len here: {lengths}."
        )
    if len(set(entries)) < len(entries):
        raise SpecializationError(
            "Two specializations are equal: shapes of one program must differ in something."
        )
    slots = entries[0].full_batch_size
    for group in [entries] if slots is None else [prefills, decodes]:
        _check_equal("batch_size", group)
        if slots is not None and group and group[0].batch_size > slots:
            raise SpecializationError(
                f"batch_size {group[0].batch_size}, of the specialization with seq_len "
                f"{group[0].seq_len}, is more than its full_batch_size {slots}."
            )
    _check_contexts(prefills, decodes)


def _check_one(s: Specialization) -> None:
    for key in SYMBOLS:
        value = getattr(s, key)
        if value is not None and not 1 <= value <= MAX_SIZE:
            limit = "at least 1" if value < 1 else f"at most {MAX_SIZE}"
            raise SpecializationError(f"{key} must be {limit}, not {shown(value)}.")
    if not s.is_decode and s.num_logits_to_keep not in (None, 1):
        raise SpecializationError(
            f"num_logits_to_keep must be 1 (prefill) or seq_len (decode), not "
            f"{s.num_logits_to_keep} where seq_len is {s.seq_len}."
        )
    if not s.is_decode and s.seq_len & (s.seq_len - 1):
        raise SpecializationError(
            f"seq_len of a prefill specialization must be a power of two, not {s.seq_len}."
        )
    if s.reach > s.ctx_len:
        raise SpecializationError(
            f"comp_ctx_lengths {s.reach} does not fit into ctx_len {s.ctx_len}."
        )
    if s.seq_len > s.reach:
        room = "ctx_len" if s.comp_ctx_lengths is None else COMP_CTX_LENGTHS
        raise SpecializationError(f"seq_len {s.seq_len} does not fit into {room} {s.reach}.")


def _check_contexts(prefills: list[Specialization], decodes: list[Specialization]) -> None:
    if decodes[0].comp_ctx_lengths is None:
        return
    ctx_len, longest = decodes[0].ctx_len, max(s.reach for s in decodes)
    if longest < ctx_len:
        raise SpecializationError(
            f"comp_ctx_lengths of one decode specialization must be ctx_len ({ctx_len}): with "
            f"{longest} at most, no answer gets farther."
        )
    for value in {s.reach for s in prefills} & {s.reach for s in decodes}:
        raise SpecializationError(
            f"comp_ctx_lengths {value} is both of a prefill and of a decode specialization, which "
            f"the compiler does not take: give the prefill one {_free_context(value, ())}."
        )


def _check_equal(key: str, entries: Sequence[Specialization]) -> None:
    values = [getattr(s, key) for s in entries]
    if len(set(values)) > 1:
        raise SpecializationError(
            f"{key} must be the same in every specialization, not "
            f"{' and '.join(map(str, list(dict.fromkeys(values))[:8]))}."
        )
