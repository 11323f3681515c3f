"""The blocks of docs/how-to/python.md run as they stand, but for the model, which is a tiny one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from byte_tokens import with_byte_tokenizer
from one_ray import OneRay, four_cards
from tiny_qpcs import TinyQpcs

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "python.md"
BLOCKS = re.findall(
    r"## ([^\n]*)\n(?:[^`#][^\n]*\n)*```python\n(.*?)```", PAGE.read_text(), re.DOTALL
)
STEPS = "The steps of a job"

pytestmark = pytest.mark.cluster


def test_every_block_is_run() -> None:
    assert len(BLOCKS) == PAGE.read_text().count("```python") == 7


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param(name, code, marks=[] if name == "Answers" else [pytest.mark.slow], id=name)
        for name, code in BLOCKS
    ],
)
def test_a_block_runs(
    name: str,
    code: str,
    one_ray: OneRay,
    tiny: TinyQpcs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = with_byte_tokenizer(tiny.checkpoint, tmp_path / "words")
    template = "{{ messages[0].content }}"
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    monkeypatch.chdir(tmp_path)
    if name == STEPS:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        code = code.replace("512", "64").replace('"smollm2-135m"', repr(str(model)))
        code = code.replace("prompt_len=32", "prompt_len=8").replace("[32]", "[8]")
    else:
        one_ray.use("four cards", four_cards)
        tiny_one = f"{str(model)!r}, qpc={str(tiny.qpc())!r}, devices=3, metrics=False"
        code = re.sub(r"(?<=LLM\()\"smollm2-135m\"(, max_model_len=512)?", tiny_one, code)
    exec(compile(code, f"{PAGE.name}: {name}", "exec"), {"__name__": "a program"})
    assert capsys.readouterr().out or name.startswith("A folder")
    assert (tmp_path / "answers").exists() == name.startswith("A folder")
    assert os.getcwd() == str(tmp_path)
