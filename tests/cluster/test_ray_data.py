"""CardPredictor on emulated cards: called by hand, and in Ray Data from parquet to parquet."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from byte_tokens import with_byte_tokenizer

from qaic_ray import CardPredictor
from qaic_ray.errors import DeviceBusy
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.timeouts import Timeouts

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

pytestmark = pytest.mark.cluster

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_data_parquet.py"
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "ray-data.md"
NUM_TOKENS = 5


@pytest.fixture
def model(tiny: TinyQpcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))  # the locks are there
    return str(with_byte_tokenizer(tiny.checkpoint, tmp_path / "words"))


def expected(tiny: TinyQpcs, model: str, text: str) -> list[int]:
    """transformers' answer."""
    prompt_ids = load_tokenizer(open_checkpoint(model, weights=False)).encode(text)
    return tiny.reference(prompt_ids, NUM_TOKENS)


def ran(command: list[str], **more: str) -> str:
    """stdout of a program that uses Ray Data."""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        # Ray alone looks for a head on the loopback interface only when told.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **more,
    }
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_called_by_hand_it_answers_as_transformers_on_a_card_of_its_own(
    tiny: TinyQpcs, model: str
) -> None:
    class Impatient(CardPredictor):
        timeouts = Timeouts(choose_s=0.1)

    texts = ["Hello", "", "x" * 100, "cards"]
    options = {"sdk": str(tiny.sdk.root), "sampling": {"max_tokens": NUM_TOKENS}}
    with (
        CardPredictor(model, str(tiny.qpc()), device_ids=(1, 2), **options) as first,
        CardPredictor(model, str(tiny.qpc()), device_ids=(1, 2), **options) as second,
    ):
        assert [one.info.name for one in (first, second)] == ["card 1", "card 2"]
        with pytest.raises(DeviceBusy, match=r"Card [12] is in use"):
            Impatient(model, str(tiny.qpc()), device_ids=(1, 2), **options)
        for one in (first, second):
            answered = one({"prompt": np.array(texts, object), "mine": np.arange(4)})
            assert list(answered["prompt"]) == texts
            assert list(answered["mine"]) == [0, 1, 2, 3]
            for at in (0, 3):
                assert answered["token_ids"][at] == expected(tiny, model, texts[at])
            assert list(answered["finish_reason"][1:3]) == ["error", "error"]
            assert "empty" in answered["error"][1]
            assert "100 tokens, more than the context" in answered["error"][2]
            assert answered["generated_tokens"][0] == len(answered["token_ids"][0])


def test_parquet_becomes_parquet(tiny: TinyQpcs, model: str, tmp_path: Path, address: str) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [chr(ord("a") + at % 26) * (1 + at % 7) for at in range(150)]
    texts[40], texts[70:140] = "", ["y" * 100] * 70  # a batch of errors alone among them
    table = pa.table({"prompt": texts, "number": list(range(len(texts)))})
    parquet.write_table(table, tmp_path / "prompts.parquet", row_group_size=50)
    command = [
        *(sys.executable, str(EXAMPLE), str(tmp_path / "prompts.parquet"), str(tmp_path / "out")),
        *("--model", model, "--qpc", str(tiny.qpc()), "--sdk", str(tiny.sdk.root)),
        *("--cards", "2", "--max-tokens", str(NUM_TOKENS)),
        *("--address", address),
    ]
    ran(command)

    answers = parquet.read_table(tmp_path / "out").sort_by("number")
    assert answers.schema.field("token_ids").type == pa.list_(pa.int64())
    rows = answers.to_pylist()
    assert [row["prompt"] for row in rows] == texts
    for row in rows:
        if row["prompt"] == "" or len(row["prompt"]) == 100:
            assert (row["finish_reason"], row["token_ids"]) == ("error", [])
            assert row["error"]
        else:
            assert row["token_ids"] == expected(tiny, model, row["prompt"])
    assert {row["worker"] for row in rows} <= {"", "card 0", "card 1"}


def program_of_page(**changes: str) -> str:
    """The program in docs/how-to/ray-data.md with other words in some places."""
    (program, *_) = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    for before, after in changes.items():
        assert program.count(before) == 1
        program = program.replace(before, after)
    return program


def rows_of(program: str, folder: Path, **environment: str) -> list[dict[str, object]]:
    (folder / "program.py").write_text(program)
    said = ran([sys.executable, str(folder / "program.py")], **environment).splitlines()
    return [json.loads(line[4:]) for line in said if line.startswith("row ")]


def on(address: str) -> dict[str, str]:
    return {
        'ray.init(resources={"QAIC": 4})': f'ray.init("{address}")',
        "print(row)": "print('row', json.dumps(row))",
        "import ray\n": "import json\nimport ray\n",
    }


def test_the_program_of_the_page_in_the_form_of_ray_data_llm(
    tiny: TinyQpcs, model: str, tmp_path: Path, address: str
) -> None:
    """As it stands, but for the model, a program that is there, and the Ray."""
    (Path(model) / "chat_template.jinja").write_text("{{ messages[0].content }}")
    program = program_of_page(**on(address), **{
        '"smollm2-135m"': f'"{model}", qpc="{tiny.qpc()}", sdk="{tiny.sdk.root}"',
        "for n in range(8)": "for n in [*range(20), 10**60]",  # that one is too long
    })  # fmt: skip
    rows = {row["question"]: row for row in rows_of(program, tmp_path)}
    assert len(rows) == 21
    long = rows.pop(f"What is {10**60} + {10**60}?")
    assert "more than the context" in str(long["__inference_error__"])
    assert long["generated_text"] == ""
    tokenizer = load_tokenizer(open_checkpoint(model, weights=False))
    for question, row in rows.items():
        # The columns of the row that failed are in its whole block.
        there = {name for name, value in row.items() if value is not None}
        assert there == {"question", "answer", "__inference_error__"}
        ids = tiny.reference(tokenizer.encode(str(question)), 16)
        assert row["answer"] == tokenizer.decode(tuple(ids))


@pytest.mark.slow
def test_a_program_without_a_main_guard_makes_its_own_qpc_and_finds_it_again(
    tiny: TinyQpcs, model: str, tmp_path: Path, address: str
) -> None:
    (Path(model) / "chat_template.jinja").write_text("{{ messages[0].content }}")
    cache = tmp_path / "of its own"
    program = program_of_page(**on(address), **{
        '"smollm2-135m"': f'"{model}", sdk="{tiny.sdk.root}", slots=2',
        "range(8)": "range(10)",
    })  # fmt: skip
    made: list[int] = []
    answers = []
    for _ in range(2):
        answers.append(rows_of(program, tmp_path, **{CACHE_VARIABLE: str(cache)}))
        made += [path.stat().st_mtime_ns for path in cache.glob("programs/*/qpc/*/programqpc.bin")]
    assert len(answers[0]) == 10
    assert all(row["answer"] and row["__inference_error__"] == "" for row in answers[0])
    assert answers[0] == answers[1]
    assert len(made) == 2
    assert made[0] == made[1]
