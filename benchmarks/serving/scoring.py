"""lm-eval's likelihoods beside transformers': a tiny fp32 program that keeps all logits.

    python scoring.py make FOLDER
    python scoring.py compare FOLDER SAMPLES.jsonl

By a process of its own, as it needs torch. `make` lays a model, its program, an SDK and a task of
lm-eval down, and writes `made.json`; `compare` prints how far apart the likelihoods are.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUM_QUESTIONS = 12
TASK = """\
task: likelihoods
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""


def make(folder: Path) -> None:
    """See the module."""
    sys.path.append(str(ROOT / "tests"))
    from byte_tokens import with_byte_tokenizer
    from tiny_qpcs import TinyQpcs

    tiny = TinyQpcs(folder)
    qpc = tiny.qpc(batch_size=4, prompt_len=32, ctx_len=128, logits="all")
    model = with_byte_tokenizer(tiny.checkpoint, folder / "model")
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(fast))
    chance = random.Random(0)
    letters = "abcdefgh ijklmnop "
    rows = [
        {
            "q": "".join(chance.choices(letters, k=chance.randrange(5, 60))).strip() + "?",
            "choices": ["".join(chance.choices(letters, k=n)).strip() or "x" for n in (3, 9, 20)],
            "gold": chance.randrange(3),
        }
        for _ in range(NUM_QUESTIONS)
    ]
    tasks = folder / "tasks"
    tasks.mkdir()
    questions = tasks / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "likelihoods.yaml").write_text(TASK % questions)
    made = {"sdk": str(tiny.sdk.root), "qpc": str(qpc), "model": str(model), "tasks": str(tasks)}
    (folder / "made.json").write_text(json.dumps(made))


def compare(folder: Path, samples: Path) -> dict[str, Any]:
    """See the module."""
    import torch
    import transformers

    made = json.loads((folder / "made.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(made["model"], dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made["model"])
    worst, number, wrong = 0.0, 0, 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        arguments = sample["arguments"]
        asked = arguments.values() if isinstance(arguments, dict) else arguments
        for given, answered in zip(asked, sample["filtered_resps"], strict=True):
            context, more = given.values() if isinstance(given, dict) else given
            before = len(tokenizer.encode(context, add_special_tokens=False))
            ids = tokenizer.encode(context + more, add_special_tokens=False)
            with torch.inference_mode():
                scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            chosen = [scores[at - 1, ids[at]].item() for at in range(before, len(ids))]
            greedy = all(int(scores[at - 1].argmax()) == ids[at] for at in range(before, len(ids)))
            worst = max(worst, abs(sum(chosen) - float(answered[0])))
            wrong += greedy is not (answered[1] in (True, "True"))
            number += 1
    return {"likelihoods": number, "worst_apart": worst, "greedy_wrong": wrong}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        json.dump(compare(Path(sys.argv[2]), Path(sys.argv[3])), sys.stdout)
