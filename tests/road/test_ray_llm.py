"""Cards in an application of Ray Serve LLM, driven by openai-python's client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from cpu import preparation  # noqa: E402
from serving.clients import VLLM_PACKAGES  # noqa: E402

APPLICATION = """
import json, socket, sys
import ray
from openai import BadRequestError, OpenAI
from ray import serve

sys.path.append(sys.argv[1])
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=4, resources={"QAIC": 2}, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
from ray_serve_llm import app

serve.run(app)
client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
asked = {"model": "smollm2", "temperature": 0, "max_tokens": 8}
messages = [{"role": "user", "content": "Say hi."}]
prompt = "The capital of France is"
whole = client.chat.completions.create(messages=messages, **asked)
stream = client.chat.completions.create(messages=messages, stream=True, **asked)
told = {
    "models": [model.id for model in client.models.list().data],
    "chat": whole.choices[0].message.content,
    "chat_stream": "".join(c.choices[0].delta.content or "" for c in stream if c.choices),
    "completion": client.completions.create(prompt=prompt, **asked).choices[0].text,
    "completion_stream": "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(prompt=prompt, stream=True, **asked)
        if chunk.choices
    ),
    "left": ray.available_resources()["QAIC"],
}
try:
    client.completions.create(**{**asked, "prompt": "word " * 4000})
except BadRequestError as error:
    told["refused"] = str(error)
print("TOLD", json.dumps(told))
serve.shutdown()
ray.shutdown()
"""
ALONE = """
import json
from qaic_ray import LLM, SamplingParams

with LLM("smollm2-135m", devices=(0,), max_model_len=512, max_num_seqs=4) as llm:
    greedy = SamplingParams(temperature=0, max_tokens=8)
    chat = llm.chat([{"role": "user", "content": "Say hi."}], greedy)
    plain = llm.generate("The capital of France is", greedy)
    print("TOLD", json.dumps([one[0].outputs[0].text for one in (chat, plain)]))
"""


def told(python: Path, program: str, folder: Path) -> object:
    done = subprocess.run(
        [python, "-c", program, str(ROOT / "examples")], cwd=folder, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=600, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("TOLD "))


@pytest.mark.slow
@pytest.mark.model
def test_an_application_of_ray_serve_llm_answers_on_cards(tmp_path: Path) -> None:
    packages = (*VLLM_PACKAGES, "fastapi<0.137")
    try:
        python = preparation.peer_python(
            tmp_path / "environment", packages, sees_ours=True, with_dependencies=False
        )
    except preparation.PeerMissing as error:
        pytest.skip(f"no environment with vLLM: {error}")
    answers = told(python, APPLICATION, tmp_path)
    chat, plain = told(Path(sys.executable), ALONE, tmp_path)  # type: ignore[misc]
    assert isinstance(answers, dict)
    assert "context" in answers.pop("refused")
    assert answers == {
        "models": ["smollm2"],
        "chat": chat,
        "chat_stream": chat,
        "completion": plain,
        "completion_stream": plain,
        "left": 1.0,
    }
