"""What an option is made of: its entry, its type and bounds, and the section that it stands in.

A section is a frozen pydantic model whose fields read `name: TYPE = opt(DEFAULT, HELP)`. Commands,
job files and the reference page are made from sections.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)
from pydantic.fields import FieldInfo

from qaic_ray import option_schemas as schemas
from qaic_ray.contract import MAX_SIZE
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import shown, user_path
from qaic_ray.limits import MAX_CORES
from qaic_ray.option_schemas import OneOrSeveral, one_of

T = TypeVar("T")
S = TypeVar("S", bound="Section")

MAX_LISTED = 1024
"""Values of one list of a job; more than anybody has cards."""

_LENGTH = re.compile(r"\s*[0-9]{1,9}\s*", re.ASCII)


class Precision(str, Enum):
    """How weights and KV cache are kept on the card."""

    FP16 = "fp16"
    MX6 = "mx6"
    """MatMul weights as MXFP6 (`-mxfp6-matmul`), the rest fp16."""
    FP32 = "fp32"
    """Nothing converted, KV cache included: for exact checks."""


class Layout(str, Enum):
    """How a QPC's folder is laid out."""

    RECIPE = "recipe"
    """As the published recipe has it: the program and what it was compiled with in one folder."""
    QEFFICIENT = "qefficient"
    """Also as QEfficient's commands want it: the program in `qpc`, one folder further down."""


class PromptFormat(str, Enum):
    """What a prompts file holds."""

    TEXT = "text"
    """A prompt on each line, as it stands."""
    JSONL = "jsonl"
    """A JSON object on each line, as `formats/json_rows.py` says, or an array of them."""
    OPENAI = "openai"
    """A request of the OpenAI batch format on each line, and nothing else."""
    CSV = "csv"
    """A table with a header: a column for each field, commas between them."""
    TSV = "tsv"
    """The same with tabs."""
    PARQUET = "parquet"
    """A table with a column for each field."""


class OutputFormat(str, Enum):
    """What a run's rows are written as; `outputs.jsonl` is always there."""

    OPENAI = "openai"
    """The OpenAI batch format: an output file, and an error file for rows that failed."""
    PARQUET = "parquet"
    """A table with a column for each key of a row."""


@dataclass(frozen=True)
class Opt:
    """What people read of an option, and how they write it on the command line.

    `flag` is the name that people learn. It is made of the field's name where it is empty; with
    None the option is a job's key only. `aliases` are other names that are taken, `short` is one of
    a single letter. `group` is its panel in the help. `shown` stands for a default that only the
    run knows. `argument` names the place of an option that may also stand without its flag. `bare`
    is what a flag without a value means. `repeated` options are given several times, other lists
    with commas. Of one with `off` only the opposite is a flag, and this is its help. `free` ones
    may be said anew of a run that goes on. `environment` are variables that are read where the flag
    is absent. `completes` is what a shell offers for its value. Nobody is shown a `hidden` flag.
    `allowed` ends the sentence that refuses a value. The help shows an `example`;
    `sample` is a value as a job has it, which the reference shows where there is no example.
    """

    help: str
    flag: str | None = ""
    aliases: tuple[str, ...] = ()
    group: str = ""
    metavar: str = ""
    argument: str = ""
    shown: str = ""
    example: str = ""
    sample: Any = None
    allowed: str = ""
    environment: tuple[str, ...] = ()
    completes: Literal["", "models", "runs"] = ""
    bare: str = ""
    short: str = ""
    repeated: bool = False
    off: str = ""
    free: bool = False
    hidden: bool = False


def opt(default: Any, help: str, **more: Any) -> Any:
    """A field that is an option; a default of `...` must be given.

    Args:
        default: its value where nothing is said.
        help: for people.
        more: what `Opt` has, and bounds as pydantic's `Field` takes them.
    """
    entry = {name: more.pop(name) for name in list(more) if name in Opt.__dataclass_fields__}
    return Field(default, description=help, json_schema_extra={"opt": entry}, **more)


def same(kind: type[BaseModel], name: str, **changes: Any) -> Any:
    """An option that another section has too: what is said of it there, but for `changes`.

    Args:
        kind: the section that declares it.
        name: of its field.
        changes: another `default`, or what `Opt` has; bounds are those of the new field's type.
    """
    field = kind.model_fields[name]
    told: Any = field.json_schema_extra
    entry = {**told["opt"], **changes}
    return opt(entry.pop("default", field.default), field.description or "", **entry)


class Section(BaseModel):
    """Options that belong together: frozen, and with no key but its own.

    `GROUP` is the panel of its options in the help. `RULES` say, as parts of a JSON schema, what no
    field says alone; they are for editors, and a test compares them with what is refused.
    """

    GROUP: ClassVar[str] = ""
    RULES: ClassVar[tuple[dict[str, Any], ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    def part(self, kind: type[S]) -> S:
        """The options of a section that this one is made of."""
        return kind.model_construct(**{name: getattr(self, name) for name in kind.model_fields})


def options_of(kind: type) -> dict[str, Opt]:
    """The options of a section, or of a pydantic dataclass, by the names of their fields.

    A group that an option does not name is its section's, and what is allowed of numbers is told by
    their bounds.
    """
    found = {}
    for name, field in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if field.json_schema_extra is not None:
            entry = Opt(field.description, **field.json_schema_extra["opt"])
            own = (base for base in kind.__mro__ if name in vars(base).get("__annotations__", ()))
            group = entry.group or getattr(next(own), "GROUP", "")
            allowed = entry.allowed or OptionValue(field).allowed
            found[name] = replace(entry, group=group, allowed=allowed)
    return found


def _bare(kind: Any) -> Any:
    """A type without its bounds."""
    return _bare(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


class OptionValue:
    """What a field may hold: its type without None and bounds, its bounds, and whether None is one.

    `kind` is a list's own type where the field holds a list; `members` are a union's.
    """

    def __init__(self, field: FieldInfo) -> None:
        kind, self.metadata = field.annotation, list(field.metadata)
        is_union = get_origin(kind) in (Union, UnionType)
        members = tuple(m for m in get_args(kind) if m is not NoneType) if is_union else (kind,)
        self.is_optional = is_union and NoneType in get_args(kind)
        if len(members) == 1:
            (kind,) = members
            while get_origin(kind) is Annotated:
                self.metadata += get_args(kind)[1:]
                kind = get_args(kind)[0]
            members = (kind,)
        self.kind: Any = kind
        self.members: tuple[Any, ...] = members

    @property
    def is_path(self) -> bool:
        """Whether it is a path."""
        return any(getattr(entry, "func", None) is as_path for entry in self.metadata)

    @property
    def item(self) -> Any:
        """The type of a list's values, None where it is no list."""
        lists = [get_args(m)[0] for m in self.members if get_origin(m) is tuple]
        return _bare(lists[0]) if lists else None

    @property
    def words(self) -> tuple[Any, ...]:
        """The values that there are, where they are few."""
        if isinstance(self.kind, type) and issubclass(self.kind, Enum):
            return tuple(member.value for member in self.kind)
        return tuple(w for m in self.members if get_origin(m) is Literal for w in get_args(m))

    @property
    def scalar(self) -> type:
        """The type of the command line's word for it."""
        if self.kind in (bool, int, float):
            return self.kind  # type: ignore[no-any-return]
        return int if self.words and all(isinstance(word, int) for word in self.words) else str

    @property
    def allowed(self) -> str:
        """What a number or a switch may be, as the end of a sentence; nothing for other types."""
        if self.kind is bool:
            return "true or false"
        words = {int: "a whole number", float: "a number"}.get(self.kind)
        bounds = [part for entry in self.metadata for part in getattr(entry, "metadata", (entry,))]
        least = next((bound.ge for bound in bounds if hasattr(bound, "ge")), None)
        most = next((bound.le for bound in bounds if hasattr(bound, "le")), None)
        if words is None or least is None:
            return words or ""
        end = "" if most is None else f" to {most}"
        return f"{words} from {least}{end}{', or nothing' if self.is_optional else ''}"


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def check_num_cores(num_cores: int) -> int:
    """NSPs of a program, 1 to 16.

    Raises:
        UsageError: for any other number.
    """
    if not 1 <= num_cores <= MAX_CORES:
        raise UsageError(
            f"The number of NSPs must be from 1 to {MAX_CORES}, not {shown(num_cores)} "
            "(a Standard card, as in a DL2q instance, has 14)."
        )
    return num_cores


def _num_cores(value: int) -> int:
    try:
        return check_num_cores(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _share(value: Any) -> Any:
    """20%, or 0.2, as a number."""
    if isinstance(value, str):
        word = value.strip()
        try:
            value = float(word.removesuffix("%")) / (100.0 if word.endswith("%") else 1.0)
        except ValueError:
            raise ValueError("must be a share, like 20%") from None
    if not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError("must be a share over 0 and up to 100%, like 20%")
    return float(value)


def as_path(value: Any) -> Any:
    """A path with `~` expanded; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        path = user_path(value, "it")
    except UsageError as error:
        raise ValueError(str(error)) from error
    return str(path) if value.startswith("~") else value


def is_template(text: str) -> bool:
    """Whether it is a Jinja template and no path to one: it has braces, or lines."""
    return "{" in text or "\n" in text


def _template(value: Any) -> Any:
    return value if isinstance(value, str) and is_template(value) else as_path(value)


def as_tuple(value: Any) -> Any:
    """A single value stands for a list of one."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(values) > MAX_LISTED:
        raise ValueError(f"must hold at most {MAX_LISTED} values")
    return values


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A value that is written twice in a grid is one."""
    if not values:
        raise ValueError("must hold at least one value")
    return tuple(dict.fromkeys(values))


def prompt_lens(value: int | str) -> tuple[int, ...]:
    """The prefill lengths of one program: `32`, or `32+128` for a program that has both.

    Raises:
        ValueError: where it is neither.
    """
    words = value.split("+") if isinstance(value, str) else [str(value)]
    if len(words) > MAX_LISTED or not all(map(_LENGTH.fullmatch, words)):
        raise ValueError("must be a number of tokens, or several like 32+128")
    lens = tuple(map(int, words))
    for length in lens:
        if length < 1 or length & (length - 1):
            raise ValueError(f"must be a power of two, not {length}")
    return lens


def _prompt_len(value: Any) -> Any:
    lens = sorted(set(prompt_lens(value)))
    if len(lens) > 1 and lens[0] == 1:  # every program has a decode shape of one token
        del lens[0]
    return lens[0] if len(lens) == 1 else "+".join(map(str, lens))


def _device_ids(value: Any) -> Any:
    ids = as_tuple(value)
    if ids == ("all",):
        return "all"
    if not all(type(i) is int and 0 <= i <= MAX_SIZE for i in ids):
        raise ValueError("must be 'all' or a list of device ids from 0")
    for qid in ids:
        if ids.count(qid) > 1:
            raise ValueError(f"holds the same value twice: device {qid} is given twice")
    return _once(ids)


PositiveInt = Annotated[int, Field(ge=1, le=MAX_SIZE), BeforeValidator(_whole_number)]
Count = Annotated[int, Field(ge=0, le=MAX_SIZE), BeforeValidator(_whole_number)]
NumCores = Annotated[
    int,
    AfterValidator(_num_cores),
    BeforeValidator(_whole_number),
    WithJsonSchema(schemas.NUM_CORES),
]
Share = Annotated[float | str, AfterValidator(_share)]
PathText = Annotated[str, BeforeValidator(as_path)]
TemplateText = Annotated[str, BeforeValidator(_template)]
PrecisionName = Annotated[Precision, one_of(known.value for known in Precision)]
PromptLen = Annotated[int | str, BeforeValidator(_prompt_len), WithJsonSchema(schemas.PROMPT_LEN)]
Listed = Annotated[
    tuple[T, ...],
    BeforeValidator(as_tuple),
    AfterValidator(_once),
    OneOrSeveral(minItems=1, maxItems=MAX_LISTED),
]
Words = Annotated[tuple[T, ...], BeforeValidator(as_tuple), OneOrSeveral(maxItems=MAX_LISTED)]
Devices = Annotated[
    Literal["all"] | tuple[int, ...], BeforeValidator(_device_ids), WithJsonSchema(schemas.DEVICES)
]
Date = Annotated[
    str,
    AfterValidator(lambda text: datetime.fromisoformat(text).isoformat()),
    WithJsonSchema(schemas.DATE),
]
