"""`generate` of transformers, or of optimum-intel on OpenVINO, as a contender.

Greedy, in float32, or with int8 weights on OpenVINO. Steps are timed by a stopping criterion, from
the first token of all rows to the last.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from answer_lines import answer_lines
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Stamps(StoppingCriteria):  # type: ignore[misc]
    """When each token of all rows was there; ends nothing."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Called by `generate` after each token."""
        self.at_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Generate:
    """A model with `generate`."""

    def __init__(self) -> None:
        self._model: Any = None

    def open(self, checkpoint: str, kind: str, threads: int, exports: str) -> dict[str, Any]:
        """Load the model; one for OpenVINO is exported once, into the folder `exports`."""
        begun_s = time.perf_counter()
        torch.set_num_threads(threads)
        if kind == "transformers":
            self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        else:
            self._model = self._openvino(checkpoint, Path(exports), threads)
        return {"seconds": time.perf_counter() - begun_s}

    @staticmethod
    def _openvino(checkpoint: str, exports: Path, threads: int) -> Any:
        from optimum.intel import OVModelForCausalLM

        if not exports.exists():
            exported = OVModelForCausalLM.from_pretrained(
                checkpoint, export=True, load_in_8bit=True, compile=False
            )
            fresh = exports.with_name(exports.name + ".new")
            exported.save_pretrained(fresh)
            fresh.rename(exports)
        settings = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"}
        return OVModelForCausalLM.from_pretrained(str(exports), ov_config=settings)

    def close(self) -> None:
        """Nothing: the model serves every batch."""

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Answer the prompts, which have one length, together."""
        begun_s = time.perf_counter()
        stamps, output = self._generate(prompts, new_tokens)
        wall_s = time.perf_counter() - begun_s
        return {
            "tokens": len(prompts) * (len(stamps.at_s) - 1),
            "seconds": stamps.at_s[-1] - stamps.at_s[0],
            "wall_s": wall_s,
            "ids": output[:, len(prompts[0]) :][:, :8].tolist(),
        }

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Seconds to the first token."""
        begun_s = time.perf_counter()
        stamps, _ = self._generate([prompt], 1)
        return {"tokens": len(prompt), "seconds": stamps.at_s[0] - begun_s}

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[Stamps, Any]:
        stamps, ids = Stamps(), torch.tensor(prompts)
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([stamps]),
            )
        return stamps, output


if __name__ == "__main__":
    if len(sys.argv) != 1:
        sys.exit("It takes requests on stdin, and no arguments.")
    peer = Generate()
    answer_lines(
        {"open": peer.open, "close": peer.close, "decode": peer.decode, "prefill": peer.prefill}
    )
