"""llama.cpp as a contender: its own server, from the wheel `xllamacpp`, with its defaults.

Beside the wall clock the server's own `timings` are looked at, and the faster of both counts.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp
from answer_lines import answer_lines

GREEDY = {"temperature": 0, "samplers": ["top_k"], "top_k": 1}
"""One sampler, so that the peer's host work is as small as it can be."""


class LlamaCpp:
    """One server, with as many slots as rows."""

    def __init__(self) -> None:
        self._server: Any = None

    def open(self, gguf: str, slots: int, ctx_len: int, threads: int) -> dict[str, Any]:
        """A server in place of the one before; `ctx_len` is of a slot."""
        self._server = None
        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.n_parallel = slots
        params.n_ctx = slots * ctx_len
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.fit_params = False
        params.cache_ram_mib = 0
        begun_s = time.perf_counter()
        self._server = xllamacpp.Server(params)
        return {"seconds": time.perf_counter() - begun_s}

    def close(self) -> None:
        """End the server."""
        self._server = None

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Answer the prompts together, each in its slot, which may hold it already."""
        begun_s = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(
                pool.map(
                    lambda slot: self._complete(
                        prompt=prompts[slot],
                        id_slot=slot,
                        cache_prompt=True,
                        ignore_eos=True,
                        n_predict=new_tokens,
                    ),
                    range(len(prompts)),
                )
            )
        wall_s = time.perf_counter() - begun_s
        timings = [answer["timings"] for answer in answers]
        tokens = sum(timing["predicted_n"] for timing in timings)
        if tokens != new_tokens * len(prompts):
            raise RuntimeError(f"{tokens} tokens, not {new_tokens} of each of {len(prompts)} rows")
        own_per_s = sum(timing["predicted_per_second"] for timing in timings)
        seconds = min(wall_s, tokens / own_per_s)
        return {
            "tokens": tokens,
            "seconds": seconds,
            "wall_s": wall_s,
            "counted_by": "its own timings" if seconds < wall_s else "the wall clock",
            "texts": [answer["choices"][0]["text"] for answer in answers],
        }

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Seconds to the first token of a prompt of which nothing is in the cache."""
        begun_s = time.perf_counter()
        answer = self._complete(prompt=prompt, id_slot=0, cache_prompt=False, n_predict=1)
        wall_s = time.perf_counter() - begun_s
        timing = answer["timings"]
        if timing["prompt_n"] != len(prompt):
            raise RuntimeError(f"{timing['prompt_n']} tokens were read, not {len(prompt)}")
        return {"tokens": len(prompt), "seconds": min(wall_s, timing["prompt_ms"] / 1e3)}

    def _complete(self, **request: Any) -> dict[str, Any]:
        result: dict[str, Any] = self._server.handle_completions(request | GREEDY)
        if "timings" not in result:
            raise RuntimeError(json.dumps(result)[:2000])
        return result


if __name__ == "__main__":
    peer = LlamaCpp()
    answer_lines(
        {"open": peer.open, "close": peer.close, "decode": peer.decode, "prefill": peer.prefill}
    )
