"""llama.cpp itself, in a process of its own: `python llama_cpp_server.py`, a JSON request a line.

Requests: `{"open": PATH}`, then `{"log_probs": IDS}`, `{"tokenize": TEXTS}`, `{"greedy": TEXT,
"max": N}`. An answer is `{"answer": ...}` or `{"error": TEXT}`. It writes a lot to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

import xllamacpp

PICKED = 5
"""An id whose token is an ASCII letter in every vocabulary of the tests."""


def open_server(path: str) -> Any:
    """A server of one slot, in float32 all through."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 512
    params.n_parallel = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.fit_params = False
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


def complete(server: Any, **request: Any) -> Any:
    request |= {"temperature": 0, "cache_prompt": False, "return_tokens": True}
    result = server.handle_completions(request)
    if "choices" not in result:
        raise RuntimeError(json.dumps(result))
    return result["choices"][0]


def log_probs(server: Any, ids: list[int]) -> list[float]:
    """Of every token after a prompt, by id."""
    # The token picked must be text by itself, or nothing is said; the figures are from before.
    choice = complete(server, prompt=ids, max_tokens=1, logprobs=10**6, logit_bias=[[PICKED, 1e6]])
    (step,) = choice["logprobs"]["content"]
    found = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
    return [found[token] for token in range(len(found))]


def tokenize(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    address = f"{server.listening_address}/tokenize"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return list(json.load(answer)["tokens"])


def main() -> None:
    # llama.cpp prints to both streams of the process.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "open" in request:
                server = None
                server = open_server(request["open"])
                answer: Any = None
            elif "log_probs" in request:
                answer = log_probs(server, request["log_probs"])
            elif "tokenize" in request:
                answer = [tokenize(server, text) for text in request["tokenize"]]
            else:
                answer = complete(server, prompt=request["greedy"], max_tokens=request["max"])
            reply = {"answer": answer}
        except (RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
