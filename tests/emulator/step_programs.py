"""Programs of tiny models of every architecture, and what their activations make of a schedule."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from compiled_here import compile_here
from random_models import export_untouched, write_checkpoint

from qaic_ray.contract import LOGITS, NUM_LOGITS_TO_KEEP, Specialization, Specializations
from qaic_ray.emulator.container.execution import Activation, CompiledProgram
from qaic_ray.options import ExportOptions

SLOTS = 3
LONGEST = 40
"""Tokens that a row of a call has at most."""
VOCAB = 300

Changes = dict[str, Any]

PRECISIONS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "fp32": ((), None),
    "fp16": (("-convert-to-fp16",), "float16"),
    "mx6": (("-convert-to-fp16", "-mxfp6-matmul"), "float16"),
    "mx6, float32 caches": (("-mxfp6-matmul",), None),
    "mx6, mxint8 caches": (("-convert-to-fp16", "-mxfp6-matmul"), "mxint8"),
}
"""Flags of the compiler, and how the caches are kept."""

LLAMA: Changes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}

MODELS: dict[str, tuple[str, Changes]] = {
    "plain loops": ("Llama", {}),
    "width 40": ("Llama", {"hidden_size": 40, "head_dim": 16, "num_hidden_layers": 2}),
    "head_dim 16": ("Llama", LLAMA | {"num_key_value_heads": 4, "vocab_size": 320}),
    "head_dim 16, one kv head": ("Llama", LLAMA | {"num_key_value_heads": 1}),
    "head_dim 32": (
        "Llama",
        LLAMA
        | {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 100,
            "vocab_size": 301,
        },
    ),
    "head_dim 48": ("Llama", LLAMA | {"head_dim": 48, "intermediate_size": 132}),
    "head_dim 64, biases": (
        "Llama",
        LLAMA
        | {
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 460,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", LLAMA | {"sliding_window": None, "head_dim": 16}),
    "Qwen2": ("Qwen2", LLAMA),
    "Qwen3": ("Qwen3", LLAMA | {"head_dim": 32, "attention_bias": True}),
    "Granite": (
        "Granite",
        LLAMA
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}
"""Sizes that reach every kernel: vectors and plain loops, last blocks that are not full."""


@dataclass(frozen=True)
class Row:
    """Tokens of one row of a call, from a position on; none are padding."""

    slot: int
    start: int
    ids: tuple[int, ...]


Call = Sequence[Row]


class TinyProgram:
    """A compiled program and its shapes.

    Attributes:
        longest: tokens that a row of a call has here at most.
    """

    def __init__(self, qpc: CompiledProgram, shapes: Specializations, options: ExportOptions):
        self.qpc = qpc
        self.shapes = shapes
        self.ctx_len = shapes.decode.ctx_len
        self.longest = min(LONGEST, max(s.seq_len for s in shapes.entries))
        self.options = options

    def run(self, activation: Activation, call: Call, output: str = LOGITS) -> list[Any]:
        """Logits [tokens, vocab] of each row of a call: of all its tokens, or of the last ones."""
        shape = self._shape(call)
        num, seq_len = shape.batch_size, shape.seq_len
        ids, positions = np.zeros((num, seq_len), np.int64), np.full((num, seq_len), -1)
        slots = np.arange(num)
        places = [i if self.shapes.continuous else row.slot for i, row in enumerate(call)]
        free = [slot for slot in range(SLOTS) if slot not in {row.slot for row in call}]
        if self.shapes.continuous:
            slots = np.array([row.slot for row in call] + free)[:num]
        for place, row in zip(places, call, strict=True):
            ids[place, : len(row.ids)] = row.ids
            positions[place, : len(row.ids)] = row.start + np.arange(len(row.ids))
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
        if self.shapes.continuous:
            inputs["batch_index"] = slots[:, None]
        most = seq_len if self.options.logits == "all" else 1
        if shape.num_logits_to_keep is not None:
            most = shape.num_logits_to_keep
            inputs["num_logits_to_keep"] = np.zeros((most, 1), np.int64)
        made = activation.run(inputs, self._wanted(num, seq_len, most))[output]
        return [
            made[place, : min(most, len(row.ids))] for place, row in zip(places, call, strict=True)
        ]

    def states(self, activation: Activation) -> dict[str, Any]:
        """Copies of the caches."""
        return {name: activation.state(name).copy() for name in self.qpc.states}

    def _wanted(self, num_rows: int, seq_len: int, most: int) -> dict[str, Any]:
        """Dims of each output but the caches."""
        dims = {}
        for b in self.qpc.bindings:
            if not b.is_input and b.name not in self.qpc.states.values():
                of_all = b.name != LOGITS and b.dims[1] > 1
                dims[b.name] = (num_rows, seq_len if of_all else most, b.dims[2])
        return dims

    def _shape(self, call: Call) -> Specialization:
        longest = max(len(row.ids) for row in call)
        fit = [
            s
            for s in self.shapes.entries
            if s.seq_len >= longest and (s.batch_size >= len(call) or not self.shapes.continuous)
        ]
        return min(fit, key=lambda s: s.seq_len)


class TinyPrograms:
    """Programs are made once each.

    Args:
        folder: where checkpoints, exports and QPCs go.
        sdk: the emulated SDK's folder.
    """

    def __init__(self, folder: Path, sdk: Path) -> None:
        self._folder = folder
        self._sdk = sdk
        self._made: dict[Any, TinyProgram] = {}
        self._exports: dict[Any, Path] = {}

    def make(
        self,
        model: str = "head_dim 16",
        precision: str = "mx6",
        *,
        ctx_len: int = 64,
        batch_size: int = SLOTS,
        edit: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> TinyProgram:
        """A program of one of `MODELS`; options are those of an export.

        `edit` changes the exported model.
        """
        chosen = {"continuous_batching": True, "logits": "all", "opset": 17} | options
        key = (model, precision, ctx_len, batch_size, edit, tuple(sorted(chosen.items())))
        if key not in self._made:
            shapes = Specializations.build(
                batch_size=batch_size,
                prompt_len=1 << (ctx_len.bit_length() - 1),
                ctx_len=ctx_len,
                continuous=chosen["continuous_batching"],
                num_logits_to_keep=chosen["logits"] == NUM_LOGITS_TO_KEEP,
                num_speculative_tokens=3 if chosen["logits"] == NUM_LOGITS_TO_KEEP else 0,
            )
            export = ExportOptions(**chosen)
            exported = self._exported(model, export)
            if edit is not None:
                exported = self._edited(exported, edit)
            qpc = self._compiled(exported, precision, shapes)
            self._made[key] = TinyProgram(qpc, shapes, export)
        return self._made[key]

    def _compiled(self, exported: Path, precision: str, shapes: Specializations) -> CompiledProgram:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        (folder / "shapes.json").write_text(shapes.to_json(named=False))
        flags, cache = PRECISIONS[precision]
        argv = [
            str(self._sdk / "exec" / "qaic-exec"),
            "-aic-hw",
            "-aic-hw-version=2.0",
            "-compile-only",
            "-retained-state",
            "-aic-num-cores=14",
            f"-m={next(exported.glob('generatedModels/*.onnx'))}",
            f"-network-specialization-config={folder / 'shapes.json'}",
            f"-aic-binary-dir={folder / 'qpc'}",
            *flags,
        ]
        if cache is not None:
            text = (exported / "custom_io.yaml").read_text().replace("float16", cache)
            (folder / "custom_io.yaml").write_text(text)
            argv.append(f"-custom-IO-list-file={folder / 'custom_io.yaml'}")
        compile_here(argv, folder / "log")
        return CompiledProgram.open(str(folder / "qpc"))

    def _edited(self, exported: Path, edit: Callable[[Any], None]) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self._folder)) / exported.name
        shutil.copytree(exported, folder)
        path = next(folder.glob("generatedModels/*.onnx"))
        model = onnx.load(path, load_external_data=False)
        edit(model)
        onnx.save(model, path)
        return folder

    def _exported(self, model: str, options: ExportOptions) -> Path:
        key = (model, options)
        if key not in self._exports:
            kind, changes = MODELS[model]
            folder = self._folder / f"{len(self._exports)}-kv"
            checkpoint = write_checkpoint(
                self._folder / f"{model}-{len(self._exports)}", kind, **changes
            )
            export_untouched(checkpoint, options, output=folder, verify="off")
            self._exports[key] = folder
        return self._exports[key]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens that every model's vocabulary has."""
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist())


def largest_error(made: Iterable[Any], expected: Iterable[Any]) -> float:
    """The largest difference, relative to the largest expected number; infinite for any NaN."""
    pairs = list(zip(made, expected, strict=True))
    error = max(float(np.abs(a - b).max()) for a, b in pairs)
    scale = max(float(np.abs(b).max()) for _, b in pairs)
    return error / scale if np.isfinite(error) else float("inf")
