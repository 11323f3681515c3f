"""The interface of an exported model and of its QPC: tensor names, I/O contracts, specializations.

Vendor words are kept exactly. Sources: the published LlamaForCausalLM recipe (`cache-index`) and
QEfficient from 1.16 on (`position-ids`). Knows nothing of ONNX files, compilers or cards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from qaic_ray.errors import SpecializationError

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
BATCH_INDEX = "batch_index"
ATTENTION_MASK = "attention_mask"
CACHE_INDEX = "cache_index"
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
LOGITS = "logits"
NEXT_TOKENS = "next_tokens"
RETAINED_SUFFIX = "_RetainedState"

PADDING_POSITION = -1
"""`position_ids` of a padding token in the `position-ids` contract."""

MAX_CORES = 16
"""NSPs of the largest Cloud AI 100 SoC (Pro, Ultra)."""

# What is compiled where nothing else is said: the published recipe's specializations.json, for the
# NSPs of a Standard card.
DEFAULT_PRECISION: Literal["mx6"] = "mx6"
DEFAULT_CORES = 14
DEFAULT_BATCH_SIZE = 1
DEFAULT_PROMPT_LEN = 256
DEFAULT_CTX_LEN = 2048


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
    `full_batch_size` is the number of slots of a continuous-batching program, None for a static
    one; its prefill then has `batch_size` 1 and its decode `batch_size` = `full_batch_size`.
    `num_logits_to_keep` is for graphs that have such an input.
    """

    batch_size: int
    seq_len: int
    ctx_len: int
    full_batch_size: int | None = None
    num_logits_to_keep: int | None = None

    def symbols(self) -> dict[str, str]:
        """ONNX dim_param -> value, as strings: the compiler's JSON reader takes nothing else."""
        symbols = {
            "batch_size": str(self.batch_size),
            "seq_len": str(self.seq_len),
            "ctx_len": str(self.ctx_len),
        }
        if self.full_batch_size is not None:
            symbols["full_batch_size"] = str(self.full_batch_size)
        if self.num_logits_to_keep is not None:
            symbols[NUM_LOGITS_TO_KEEP] = str(self.num_logits_to_keep)
        return symbols


@dataclass(frozen=True)
class Specializations:
    """The prefill and decode shapes of one QPC; a decode-only QPC (`pl1`) has no prefill.

    Raises:
        SpecializationError: on construction, where the shapes cannot live in one program.
    """

    entries: tuple[Specialization, ...]

    def __post_init__(self) -> None:
        check_specializations(self.entries)

    @property
    def prefill(self) -> Specialization:
        """The shape with the longest `seq_len`."""
        return max(self.entries, key=lambda s: s.seq_len)

    @property
    def decode(self) -> Specialization:
        """The shape with `seq_len` 1."""
        return min(self.entries, key=lambda s: s.seq_len)

    @property
    def prompt_len(self) -> int:
        """Tokens of one prefill chunk."""
        return self.prefill.seq_len

    @property
    def ctx_len(self) -> int:
        """Tokens, prompt and answer together, that one row can hold."""
        return self.decode.ctx_len

    @property
    def batch_size(self) -> int:
        """Rows decoded at once: slots of a continuous-batching program, rows of a static one."""
        return self.decode.full_batch_size or self.decode.batch_size

    @property
    def continuous(self) -> bool:
        """Whether rows have slots of their own that are refilled while others run."""
        return self.decode.full_batch_size is not None

    @classmethod
    def build(
        cls, *, batch_size: int, prompt_len: int, ctx_len: int, continuous: bool
    ) -> Specializations:
        """The usual pair: one prefill and one decode shape (one shape where `prompt_len` is 1)."""
        slots = batch_size if continuous else None
        decode = Specialization(batch_size, 1, ctx_len, slots)
        if prompt_len == 1:
            return cls((decode,))
        prefill = Specialization(1 if continuous else batch_size, prompt_len, ctx_len, slots)
        return cls((prefill, decode))

    def to_json(self, *, named: bool) -> str:
        """The compiler's file: flat for the SDKs up to 1.21, `{name, symbols}` from 1.22 on."""
        entries: list[Any] = [s.symbols() for s in self.entries]
        if named:
            entries = [
                {"name": "Decode" if s.seq_len == 1 else "Prefill", "symbols": s.symbols()}
                for s in self.entries
            ]
        return json.dumps({"specializations": entries}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Specializations:
        """Read either form; `source` names the file in errors."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecializationError(f"{source} is not JSON: {error}.") from error
        entries = document.get("specializations") if isinstance(document, dict) else None
        if not isinstance(entries, list) or not entries:
            raise SpecializationError(
                f"{source} must be an object whose 'specializations' is a list with one entry for "
                "prefill and one for decode."
            )
        return cls(tuple(_entry(entry, source, i) for i, entry in enumerate(entries)))

    @classmethod
    def load(cls, path: Path) -> Specializations:
        """Read a specializations.json."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise SpecializationError(
                f"Cannot read the specializations file {path}: {error.strerror}."
            ) from error
        return cls.from_json(text, source=str(path))


def _entry(entry: Any, source: str, index: int) -> Specialization:
    symbols = entry.get("symbols", entry) if isinstance(entry, dict) else None
    if not isinstance(symbols, dict):
        raise SpecializationError(f"{source}: specialization {index} must be an object.")
    known = ("batch_size", "seq_len", "ctx_len", "full_batch_size", NUM_LOGITS_TO_KEEP)
    values: dict[str, int] = {}
    for key, value in symbols.items():
        if key in ("name", "full_batch_exec_size"):
            continue
        if key not in known:
            raise SpecializationError(
                f"{source}: specialization {index} has the unknown key {key!r}; "
                f"use {', '.join(known)}."
            )
        try:
            if isinstance(value, bool):
                raise ValueError
            values[key] = int(value)
        except (TypeError, ValueError):
            raise SpecializationError(
                f"{source}: {key} of specialization {index} must be a whole number, not {value!r}."
            ) from None
    missing = [key for key in known[:3] if key not in values]
    if missing:
        raise SpecializationError(
            f"{source}: specialization {index} lacks {' and '.join(missing)}."
        )
    return Specialization(**values)


def check_specializations(entries: tuple[Specialization, ...]) -> None:
    """Refuse what the recipe's compiler scripts would only find out late.

    Raises:
        SpecializationError: naming the key, the values and the rule.
    """
    if not entries:
        raise SpecializationError("There must be at least one specialization.")
    for s in entries:
        for key, value in (
            ("batch_size", s.batch_size),
            ("seq_len", s.seq_len),
            ("ctx_len", s.ctx_len),
            ("full_batch_size", s.full_batch_size),
            (NUM_LOGITS_TO_KEEP, s.num_logits_to_keep),
        ):
            if value is not None and value < 1:
                raise SpecializationError(f"{key} must be at least 1, not {value}.")
    _check_equal("ctx_len", [s.ctx_len for s in entries])
    _check_equal("full_batch_size", [s.full_batch_size for s in entries])
    if entries[0].full_batch_size is None:
        _check_equal("batch_size", [s.batch_size for s in entries])
    decodes = [s for s in entries if s.seq_len == 1]
    if len(decodes) != 1:
        raise SpecializationError(
            "Exactly one specialization must be the decode one, with seq_len 1; "
            f"seq_len here: {', '.join(str(s.seq_len) for s in entries)}."
        )
    for s in entries:
        if s.seq_len & (s.seq_len - 1):
            raise SpecializationError(
                f"seq_len of a prefill specialization must be a power of two, not {s.seq_len}."
            )
        if s.seq_len > s.ctx_len:
            raise SpecializationError(f"seq_len {s.seq_len} does not fit into ctx_len {s.ctx_len}.")
    slots = entries[0].full_batch_size
    if slots is not None and decodes[0].batch_size > slots:
        raise SpecializationError(
            f"batch_size {decodes[0].batch_size} of the decode specialization is more than its "
            f"full_batch_size {slots}."
        )


def _check_equal(key: str, values: list[int | None] | list[int]) -> None:
    if len(set(values)) > 1:
        raise SpecializationError(
            f"{key} must be the same in every specialization, not "
            f"{' and '.join(str(v) for v in dict.fromkeys(values))}."
        )
