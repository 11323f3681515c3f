"""Host work of QEfficient's own loop a decode step; run by `host_overhead.py` in its environment.

    python qefficient_overhead.py PROGRAMS TOKENIZER STEPS WARM_UP

PROGRAMS is a folder of programs of `instant_card.py`, whose `qaicrt` must be on the path, TOKENIZER
a folder that transformers opens (or `-`: attributes of a plain object, which cost nothing). All
rows run, in continuous batching, by QEfficient's `TextGeneration` on its `QAICInferenceSession`.
The last line of stdout is one JSON object: program -> when its steps started and were done, in ns.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import qaicrt
from QEfficient.generation.text_generation_inference import (  # type: ignore[import-not-found]
    TextGeneration,
)

PROMPT = "The history of the sea is long"


class PlainTokenizer:
    """As much of a tokenizer as the loop asks for."""

    padding_side = "right"
    pad_token_id = eos_token_id = 2

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        length = options.get("max_length") or 8
        mask = (np.arange(length) < 8).astype(np.int64)[None]
        return {"input_ids": mask * 7, "attention_mask": mask}

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """No text."""
        return [""] * len(ids)


def open_tokenizer(name: str) -> Any:
    """The plain one, or transformers'."""
    if name == "-":
        return PlainTokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, padding_side="right")


def measure(program: Path, tokenizer: Any, steps: int, warm_up: int) -> list[list[int]]:
    """Start and end of each of `steps` decode steps after `warm_up` ones."""
    shape = json.loads((program / "program.json").read_text())
    loop = TextGeneration(
        tokenizer=tokenizer,
        qpc_path=str(program),
        full_batch_size=shape["batch_size"],
        ctx_len=shape["ctx_len"],
        device_id=[0],
    )
    qaicrt.ENQUEUED_NS.clear()
    qaicrt.COMPLETED_NS.clear()
    info = loop.generate(
        [PROMPT] * shape["batch_size"], generation_len=steps + warm_up + 2, stream=False
    )
    expected = qaicrt.rows_of_logits(shape["batch_size"], shape["vocab_size"]).argmax(1)
    # Its own first column is another row's after a refill, so the steps' tokens are looked at.
    if not (np.asarray(info.generated_ids)[:, 1:steps] == expected[:, None]).all():
        raise SystemExit("QEfficient's tokens are not those of the logits")
    return [qaicrt.ENQUEUED_NS[-steps - 1 :], qaicrt.COMPLETED_NS[-steps - 1 :]]


def main() -> None:
    programs, tokenizer, steps, warm_up = sys.argv[1:]
    opened = open_tokenizer(tokenizer)
    with contextlib.redirect_stdout(sys.stderr):
        results = {
            program.name: measure(program, opened, int(steps), int(warm_up))
            for program in sorted(Path(programs).iterdir())
            if json.loads((program / "program.json").read_text())["output"] == "logits"
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
