"""The public names: which there are, what they take, what importing them loads, and their types.

`surface.txt` is the lock: `python tests/api/test_surface.py` writes it anew.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import pytest

import qaic_ray

LOCK = Path(__file__).with_name("surface.txt")
STUB = Path(qaic_ray.__file__).with_name("__init__.pyi")
LOCKED = ("LLM", "AsyncLLM", "SamplingParams", "RequestOutput", "CompletionOutput", "Logprob")
"""Classes whose methods are locked too."""


def surface() -> Iterator[str]:
    """A line a name; and a line a public method, for some classes."""
    for name in qaic_ray.__all__:
        value: Any = getattr(qaic_ray, name)
        yield f"{name}{_signature(value)}"
        for member in sorted(vars(value)) if name in LOCKED else ():
            if not member.startswith("_"):
                yield f"{name}.{member}{_signature(getattr(value, member))}"


def _signature(value: object) -> str:
    # TypedDict and Enum have signatures of Python's own, which differ by its version.
    if isinstance(value, type) and not value.__module__.startswith("qaic_ray.api"):
        return ""
    if not callable(value) or getattr(value, "__total__", None) is not None:
        return ""
    if isinstance(value, UnionType):
        return f" = {value}"
    if isinstance(value, type) and value.__name__ == "RequestOutputKind":
        return ""
    return str(inspect.signature(value))


def test_names_and_signatures_are_as_they_were() -> None:
    assert "\n".join(surface()) + "\n" == LOCK.read_text()


def test_the_list_is_sorted_and_dir_has_it() -> None:
    public = [name for name in qaic_ray.__all__ if name != "__version__"]
    # Constants, then classes, then functions, each by name: ruff's order.
    assert public == sorted(public, key=lambda n: (not n.isupper(), n.islower(), n))
    assert set(qaic_ray.__all__) <= set(dir(qaic_ray))


def test_the_types_are_of_the_same_names() -> None:
    tree = ast.parse(STUB.read_text())
    found = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert found | {"__version__"} == set(qaic_ray.__all__)
    listed = next(node for node in tree.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(listed.value) == qaic_ray.__all__


def test_a_name_that_is_not_there_says_so() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        assert qaic_ray.LLMs  # type: ignore[attr-defined]


def test_rooms_that_are_functions_stay_rooms() -> None:
    for room in ("compile", "export"):
        module = importlib.import_module(f"qaic_ray.{room}")
        assert module is getattr(qaic_ray, room)
        assert list(inspect.signature(module).parameters)[-1] == "options"  # type: ignore[arg-type]
    assert importlib.import_module("qaic_ray.export.export").export_model


def test_parameters_and_errors_load_no_ray_and_no_torch() -> None:
    names = [name for name in qaic_ray.__all__ if name not in ("CardPredictor", "__version__")]
    code = f"from qaic_ray import {', '.join(names)}\nimport sys\n"
    code += "print({'ray', 'torch', 'transformers', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


USER = """
import asyncio

import qaic_ray
from qaic_ray import (
    LLM,
    AsyncLLM,
    CompletionOutput,
    GenerationError,
    Job,
    ParameterError,
    PromptType,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)


def answers(prompts: list[str]) -> list[str]:
    how = SamplingParams(temperature=0.2, max_tokens=4, stop=["."])
    how.max_tokens = None
    text: TextPrompt = {"prompt": "a"}
    ids: TokensPrompt = {"prompt_token_ids": [1]}
    with LLM("m", devices=(0,), max_model_len=64, folder="kept", enforce_eager=True) as llm:
        mixed: list[PromptType] = [*prompts, text, ids, [1, 2]]
        outputs: list[RequestOutput] = llm.generate(mixed, how)
        outputs += llm.chat([{"role": "user", "content": "Hi"}], how, use_tqdm=False)
        for output in llm.stream("a", SamplingParams(output_kind=RequestOutputKind.DELTA)):
            first: CompletionOutput = output.outputs[0]
            print(first.text, first.logprobs and first.logprobs[0][5].logprob)
        try:
            llm.generate("a", errors="return")
        except (GenerationError, ParameterError) as error:
            print(error)
        return [output.outputs[0].text for output in outputs if output.metrics]


async def stream() -> None:
    async with AsyncLLM("m") as llm:
        async for output in llm.generate("a", request_id="one"):
            print(output.prompt_token_ids, output.finished)
        await llm.abort("one")


def steps(job: Job) -> None:
    built = qaic_ray.compile(qaic_ray.export("m").folder, precision=["mx6"])
    print(built[0].path, qaic_ray.plan(job).text, qaic_ray.launch("job.yaml").folder)


asyncio.run(stream())
"""


@pytest.mark.slow
def test_a_program_that_uses_all_of_it_is_typed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(USER)
    where = str(Path(qaic_ray.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=where,
    )
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    LOCK.write_text("\n".join(surface()) + "\n")
