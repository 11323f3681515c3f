"""A request that was read: what the fleet is asked, and what its answer needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qaic_ray.rows import Prompt
from qaic_ray.serve.protocol.conversations import Conversation

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
ENDPOINTS = (COMPLETIONS, CHAT, RESPONSES)
"""Those that a batch may name too."""


@dataclass(frozen=True)
class Asked:
    """A request that can be answered.

    Attributes:
        endpoint: the route.
        prompts: in order; each has its token ids, and asks for `n` samples by its sampling.
        model: the name that the answer shows.
        texts: of the prompts, for `echo`; empty where nobody asked.
        stream: whether the answer is told while it comes.
        include_usage: whether a stream ends with what was used.
        continuous_usage: whether each of its chunks has it too.
        echo: whether completions begin with their prompts.
        num_logprobs: how many alternatives each token's log-probabilities list; None for none.
        drops_answer: whether the one token that was made is not wanted: only the prompt is scored.
        shows_ids: whether token ids are given back.
        ids_as_tokens: whether tokens are written `token_id:N`.
        conversation: what a chat's answer needs of its tools; None elsewhere.
        body: the request's own fields, for the parts of an answer that repeat them.
    """

    endpoint: str
    prompts: tuple[Prompt, ...]
    model: str
    texts: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    num_logprobs: int | None = None
    drops_answer: bool = False
    shows_ids: bool = False
    ids_as_tokens: bool = False
    conversation: Conversation | None = None
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples of each prompt."""
        sampling = self.prompts[0].sampling
        return 1 if sampling is None else sampling.n

    def call_seed(self, answer_id: str, index: int) -> str:
        """What the ids of tool calls in choice `index` are made of.

        A client may give every request of a conversation one id: its prompt grows all the same.
        """
        return f"{answer_id}/{len(self.prompts[0].token_ids or ())}/{index}"
