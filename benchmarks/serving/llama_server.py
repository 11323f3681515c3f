"""llama.cpp's own server, until standard input ends: `python llama_server.py OPTIONS`.

OPTIONS is a JSON object: `gguf`, `slots`, `ctx_len` of a slot, `threads`. Prints a JSON line with
its address.
"""

from __future__ import annotations

import json
import os
import sys

import xllamacpp


def main() -> None:
    """Serve."""
    given = json.loads(sys.argv[1])
    # llama.cpp prints to both streams of the process.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = given["gguf"]
    params.n_parallel = given["slots"]
    params.n_ctx = given["slots"] * given["ctx_len"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
    params.fit_params = False
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    answers.write(json.dumps({"address": server.listening_address}) + "\n")
    answers.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
