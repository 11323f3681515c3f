"""llama.cpp as the tests ask it: an independent truth about GGUF files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SERVER = Path(__file__).with_name("llama_cpp_server.py")


class LlamaCpp:
    """A child process that runs one GGUF file after the other; a context manager."""

    def __enter__(self) -> LlamaCpp:
        self._child = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait(30)
        self._child.stdout.close()

    def open(self, path: Path) -> None:
        """Load a file; what is asked then is asked of it."""
        self._ask(open=str(path))

    def log_probs(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """[vocab]: of each token after a prompt."""
        return np.array(self._ask(log_probs=ids))

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts, with what the file says is put around them."""
        return list(self._ask(tokenize=texts))

    def greedy(self, prompt: str, num_tokens: int) -> str:
        """The text that follows a prompt."""
        return str(self._ask(greedy=prompt, max=num_tokens)["text"])

    def _ask(self, **request: Any) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        assert line, f"llama.cpp died of {request}"
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["answer"]
