"""A tiny random Llama: its QPCs in every contract and shape, and transformers' own answers.

Compiled without `-convert-to-fp16`, so that the emulated card computes in float32 and its greedy
answers are transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compiled_here import compile_here
from random_models import export_untouched, write_checkpoint

from qaic_ray.compile.compiler import Variant
from qaic_ray.compile.store import BuildRequest, build
from qaic_ray.contract import NUM_LOGITS_TO_KEEP, IoContract, Specializations
from qaic_ray.model.checkpoint import load_torch_model
from qaic_ray.option_types import Precision
from qaic_ray.options import EmulatorOptions, ExportOptions
from qaic_ray.pipeline.compile_step import open_folder
from qaic_ray.sdk import Sdk, find_sdk

VOCAB_SIZE = 300
EOS_ID = 2
MAX_POSITION = 256
DEFAULT_EMULATOR = EmulatorOptions()


class TinyQpcs:
    """Everything is made once and kept until the end of the session.

    Attributes:
        sdk: the emulated SDK that compiles and runs them; it has four Standard cards.
        checkpoint: the model.
    """

    def __init__(
        self,
        folder: Path,
        # A process can have the runtime of one SDK only, and the tests of the real model have this.
        emulator: EmulatorOptions = DEFAULT_EMULATOR,
        *,
        max_position: int = MAX_POSITION,
    ) -> None:
        self._folder = folder
        self.sdk: Sdk = find_sdk("emulated", emulator)
        self.checkpoint = write_checkpoint(
            folder / "tiny", num_hidden_layers=2, max_position_embeddings=max_position
        )
        self._exports: dict[ExportOptions, Path] = {}
        self._qpcs: dict[tuple[ExportOptions, Specializations, int], Path] = {}
        self._answers: dict[tuple[int, ...], tuple[list[int], Any, list[Any]]] = {}
        self._model: Any = None

    def qpc(
        self,
        *,
        io: IoContract = IoContract.POSITION_IDS,
        continuous: bool = True,
        batch_size: int = 4,
        prompt_len: int | Sequence[int] = 8,
        prefill_rows: int = 1,
        ctx_len: int = 64,
        logits: str = "last",
        next_tokens: bool = False,
        num_speculative_tokens: int = 0,
        comp_ctx_lengths: Sequence[int] = (),
        num_cores: int = 14,
    ) -> Path:
        """The folder of a QPC; the arguments are those of export and compile."""
        logits = NUM_LOGITS_TO_KEEP if num_speculative_tokens else logits
        options = ExportOptions(
            io=io,
            continuous_batching=continuous and io is IoContract.POSITION_IDS,
            opset=13 if io is IoContract.CACHE_INDEX else 17,
            logits=logits,
            next_tokens=next_tokens,
            comp_ctx_lengths=bool(comp_ctx_lengths),
        )
        shapes = Specializations.build(
            batch_size=batch_size,
            prompt_len=prompt_len,
            ctx_len=ctx_len,
            continuous=options.continuous_batching,
            num_logits_to_keep=logits == NUM_LOGITS_TO_KEEP,
            num_speculative_tokens=num_speculative_tokens,
            comp_ctx_lengths=comp_ctx_lengths,
        )
        if options.continuous_batching:
            shapes = shapes.with_prefill_rows(prefill_rows)
        if (options, shapes, num_cores) not in self._qpcs:
            source = open_folder(self.exported(options)).source
            variant = Variant(source, Precision.FP32, num_cores, shapes)
            request = BuildRequest(variant, self.sdk, self._folder / "qpc")
            self._qpcs[options, shapes, num_cores] = build(request, compile_here).path
        return self._qpcs[options, shapes, num_cores]

    def exported_for(self, qpc: Path) -> Path:
        """The folder of the model that a QPC was compiled from."""
        options = next(key[0] for key, path in self._qpcs.items() if path == qpc)
        return self._exports[options]

    def exported(self, options: ExportOptions) -> Path:
        """The folder of an exported model."""
        if options not in self._exports:
            folder = self._folder / f"{len(self._exports)}-kv"
            export_untouched(self.checkpoint, options, output=folder, verify="off")
            self._exports[options] = folder
        return self._exports[options]

    def reference(
        self, prompt_ids: Sequence[int], num_tokens: int, stop_ids: Sequence[int] = (EOS_ID,)
    ) -> list[int]:
        """transformers' greedy answer; where there is a stop token it ends with it."""
        made = self._extend(prompt_ids, num_tokens)[0][:num_tokens]
        ends = [index for index, token in enumerate(made) if token in stop_ids]
        return made[: ends[0] + 1] if ends else made

    def reference_logits(self, prompt_ids: Sequence[int], num_tokens: int) -> Any:
        """[num_tokens, vocab] float32: the logits that chose the tokens of `reference`."""
        return np.stack(self._extend(prompt_ids, num_tokens)[2][:num_tokens])

    def _extend(
        self, prompt_ids: Sequence[int], num_tokens: int
    ) -> tuple[list[int], Any, list[Any]]:
        if self._model is None:
            self._model = load_torch_model(self.checkpoint)
        key = tuple(prompt_ids)
        made, past, logits = self._answers.get(key, ([], None, []))
        while len(made) < num_tokens:
            fresh = torch.tensor([made[-1:] or list(key)])
            with torch.inference_mode():
                result = self._model(fresh, past_key_values=past, use_cache=True)
            past = result.past_key_values
            logits.append(result.logits[0, -1].numpy())
            best = np.sort(logits[-1])[-2:]
            assert best[1] - best[0] > 1e-5, "two best tokens are a tie: choose another prompt"
            made.append(int(logits[-1].argmax()))
        self._answers[key] = (made, past, logits)
        return self._answers[key]
