"""One compile of a model: precision, NSPs and shapes; its name, its argv; a grid of many; its run.

A compiler runs under a guard, with a log and a time limit, and its result is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from qaic_ray import guard
from qaic_ray.contract import MAX_VARIANTS, Specializations
from qaic_ray.errors import CompileError, SpecializationError, UsageError
from qaic_ray.option_types import Precision, check_num_cores, prompt_lens
from qaic_ray.options import CompileOptions
from qaic_ray.sdk import Sdk
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts
from qaic_ray.weight_files.content import PointedAt

QPC_FILE = "programqpc.bin"
QPC_MAGIC = bytes.fromhex("7ccda100")
"""First bytes of a QPC: 0x00A1CD7C, little-endian."""

_HEADER = struct.Struct("<4s4xQ")
"""Of a QPC: the magic, version and compression, the size of the whole file."""
_MAX_WORDS = 1000
_PATH_FLAGS = ("-m=", "-network-", "-custom-IO", "-aic-binary-dir=")


@dataclass(frozen=True)
class Source:
    """What is compiled: an exported model, as files.

    `name` is its folder's (`<base>-kv`); `digest` stands for graph and weights together.
    `custom_io` is absent for a model whose state is left as the graph has it; `external` are
    weights that lie in the files of a checkpoint.
    """

    name: str
    onnx: Path
    custom_io: Path | None
    digest: str
    external: PointedAt | None = None


@dataclass(frozen=True)
class Variant:
    """A source compiled one way."""

    source: Source
    precision: Precision
    num_cores: int
    specializations: Specializations

    def __post_init__(self) -> None:
        check_num_cores(self.num_cores)

    @property
    def name(self) -> str:
        """Folder name, as the published recipe builds it, with the precision at its end."""
        s = self.specializations
        together = f"{_prefill_rows(s)}rows-" if _prefill_rows(s) > 1 else ""
        speculated = f"{s.decode_len - 1}spec-" if s.decode_len > 1 else ""
        return (
            f"{self.source.name}-{_prompt_lens(s)}pl-{_contexts(s)}cl-{self.num_cores}c-"
            f"{s.batch_size}BS-{together}{speculated}{_mark(s)}{self.precision.value}"
        )

    @property
    def label(self) -> str:
        """Short name for tables and the Ray dashboard."""
        s = self.specializations
        together = f" rows{_prefill_rows(s)}" if _prefill_rows(s) > 1 else ""
        speculated = f" spec{s.decode_len - 1}" if s.decode_len > 1 else ""
        return (
            f"{self.precision.value} {self.num_cores}c pl{_prompt_lens(s)} cl{_contexts(s)} "
            f"bs{s.batch_size}{together}{speculated}"
        )

    def argv(self, sdk: Sdk, specializations: Path, binary_dir: Path) -> list[str]:
        """The compiler's command line, in the vendor's words.

        Args:
            sdk: decides binary, `-aic-hw-version` and whether `-compile-only` is said.
            specializations: the JSON file, written in the form that this SDK reads.
            binary_dir: where the QPC goes; must not exist yet.
        """
        argv = [
            str(sdk.compiler),
            "-aic-hw",
            f"-aic-hw-version={sdk.hw_version}",
            f"-m={self.source.onnx}",
            "-retained-state",
        ]
        if sdk.compile_only:
            argv.append("-compile-only")
        if self.precision is not Precision.FP32:
            argv.append("-convert-to-fp16")
        if self.precision is Precision.MX6:
            argv.append("-mxfp6-matmul")
        argv += [
            f"-aic-num-cores={self.num_cores}",
            f"-network-specialization-config={specializations}",
        ]
        if self.precision is not Precision.FP32 and self.source.custom_io is not None:
            argv.append(f"-custom-IO-list-file={self.source.custom_io}")
        argv.append(f"-aic-binary-dir={binary_dir}")
        return argv

    def key_entries(self, sdk: Sdk, compiler_digest: str) -> list[tuple[str, str]]:
        """What the result depends on, by name: the cache key, explainable entry by entry."""
        # At fp32 it is not passed.
        custom_io = None if self.precision is Precision.FP32 else self.source.custom_io
        here = Path("-")
        flags = [a for a in self.argv(sdk, here, here)[1:] if not a.startswith(_PATH_FLAGS)]
        return [
            ("format", "1"),
            ("model", self.source.digest),
            ("flags", " ".join(flags)),
            ("specializations", self.specializations.to_json(named=sdk.named_specializations)),
            ("custom_io", _sha256(custom_io.read_bytes()) if custom_io else ""),
            ("sdk", f"{sdk.kind} {sdk.apps_version}"),
            ("compiler", compiler_digest),
        ]


def _prompt_lens(shapes: Specializations) -> str:
    lens = dict.fromkeys(s.seq_len for s in shapes.prefills) or {1: None}
    return "+".join(map(str, lens))


def _prefill_rows(shapes: Specializations) -> int:
    """Rows of a prefill of a continuous-batching program, 1 for every other one."""
    return shapes.prefills[0].batch_size if shapes.continuous and shapes.prefills else 1


def _contexts(shapes: Specializations) -> str:
    return "+".join(map(str, dict.fromkeys(sorted(s.reach for s in shapes.decodes))))


def _mark(shapes: Specializations) -> str:
    """Nothing for the usual shapes; a few digits of a digest for a file's, which a name omits."""
    first, decodes = shapes.entries[0], shapes.decodes
    try:
        usual = Specializations.build(
            batch_size=shapes.batch_size,
            prompt_len=[1, *(s.seq_len for s in shapes.prefills)],
            ctx_len=shapes.ctx_len,
            continuous=shapes.continuous,
            num_logits_to_keep=first.num_logits_to_keep is not None,
            num_speculative_tokens=shapes.decode_len - 1,
            comp_ctx_lengths=[s.comp_ctx_lengths for s in decodes if s.comp_ctx_lengths],
        )
        if shapes.continuous:
            usual = usual.with_prefill_rows(_prefill_rows(shapes))
    except SpecializationError:
        usual = None
    if usual is not None and set(usual.entries) == set(shapes.entries):
        return ""
    return _sha256(shapes.to_json(named=False).encode())[:6] + "-"


def key_digest(entries: Iterable[tuple[str, str]]) -> str:
    """One digest of all key entries, order included."""
    return _sha256(json.dumps(list(entries)).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def grid_variants(
    source: Source, grid: CompileOptions, *, continuous: bool, num_logits_to_keep: bool = False
) -> list[Variant]:
    """Every combination of a grid's lists; equal ones are one.

    The order is precision, NSPs, batch, prompt, context.

    Args:
        source: what is compiled.
        grid: the lists; the rest of it is the same in every variant.
        continuous: whether the graph is a continuous-batching one; batch sizes then are numbers of
            slots.
        num_logits_to_keep: whether the graph has that input.

    Raises:
        UsageError: for more variants than may be, and for prefill rows that a variant cannot have.
    """
    lists = (grid.precision, grid.num_cores, grid.batch_size, grid.prompt_len, grid.ctx_len)
    number = prod(map(len, lists))
    if number > MAX_VARIANTS:
        raise UsageError(
            f"That is a grid of {number} variants: at most {MAX_VARIANTS} are compiled at "
            "once; shorten the lists."
        )
    if grid.prefill_rows > 1:
        _check_prefill_rows(grid, continuous=continuous)
    variants = []
    for precision, cores, batch, prompt, ctx in product(*lists):
        shapes = Specializations.build(
            batch_size=batch,
            prompt_len=prompt_lens(prompt),
            ctx_len=ctx,
            continuous=continuous,
            num_logits_to_keep=num_logits_to_keep,
            num_speculative_tokens=grid.num_speculative_tokens,
            comp_ctx_lengths=grid.comp_ctx_lengths,
        )
        if continuous:
            shapes = shapes.with_prefill_rows(grid.prefill_rows)
        variants.append(Variant(source, precision, cores, shapes))
    return list(dict.fromkeys(variants))


def _check_prefill_rows(grid: CompileOptions, *, continuous: bool) -> None:
    rows = grid.prefill_rows
    if not continuous:
        raise UsageError(
            f"prefill_rows {rows} is for continuous batching: all rows of a static program are in "
            "each of its prefills already; leave it out, or export with continuous batching."
        )
    if rows > min(grid.batch_size):
        raise UsageError(
            f"prefill_rows {rows} is more than batch_size {min(grid.batch_size)}: a prefill has "
            "no more rows than the program has slots."
        )
    if any(prompt_lens(prompt) == (1,) for prompt in grid.prompt_len):
        raise UsageError(
            f"prefill_rows {rows} needs a prefill: a program of prompt_len 1 is decode only."
        )


def run_compiler(argv: list[str], log: Path, *, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> None:
    """Run a compiler to its end; stdout and stderr go to `log`.

    Raises:
        CompileError: when it cannot be started, fails, or outlives `compile_s`; the message ends
            with the compiler's own last words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        output.write((" ".join(argv) + "\n").encode())
        output.flush()
        code = None
        with (
            guard.guarded(argv, output, end_s=timeouts.guard_s) as process,
            suppress(subprocess.TimeoutExpired),
        ):
            code = process.wait(timeouts.compile_s)
    text = log.read_text(encoding="utf-8", errors="replace")
    why = _last_words(text, 1)
    if code == guard.NOT_STARTED and why.startswith(guard.CANNOT_START):
        raise CompileError(
            f"Cannot start the compiler {argv[0]}: {why.removeprefix(guard.CANNOT_START)}."
        )
    if code is None:
        raise CompileError(f"The compiler was stopped after {timeouts.compile_s:.0f} s.", log=text)
    if code != 0:
        raise CompileError(
            f"The compiler ended with exit code {code}: {_last_words(text)}",
            exit_code=code,
            log=text,
        )


def check_qpc(directory: Path, log: Path) -> None:
    """Check what a compiler left, which may exit 0 and leave nothing.

    Raises:
        CompileError: when there is no QPC, or it is not a whole one.
    """
    fault = program_fault(directory)
    if not fault:
        return
    text = log.read_text(encoding="utf-8", errors="replace")
    if not (directory / QPC_FILE).is_file():
        fault = f"The compiler said it was done but left no {QPC_FILE}"
    raise CompileError(f"{fault}: {_last_words(text)}", log=text)


def program_fault(directory: Path) -> str:
    """What is wrong with a folder's QPC by its header, as the start of a sentence, or empty.

    The header's size is what the vendor's loader compares with the file's.
    """
    binary = directory / QPC_FILE
    try:
        if binary.exists() and not binary.is_file():
            return f"{binary} is not a file"
        with binary.open("rb") as file:
            header = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        return f"{binary} cannot be read ({error.strerror})"
    if header[: len(QPC_MAGIC)] != QPC_MAGIC:
        return f"{binary} is not a QPC: it begins {header[: len(QPC_MAGIC)].hex() or 'nowhere'}"
    whole = _HEADER.unpack(header)[1] if len(header) == _HEADER.size else _HEADER.size
    if size < whole:
        return f"{binary} is cut short: it has {size} bytes of {whole}"
    return ""


def _last_words(log: str, lines: int = 3) -> str:
    words = [line.strip()[:_MAX_WORDS] for line in log.splitlines()[1:] if line.strip()]
    return " / ".join(words[-lines:]) or "it printed nothing."
