"""What requests are read with: the model that they are for."""

from __future__ import annotations

from dataclasses import dataclass, field

from qaic_ray.files.documents import shown
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.protocol.token_texts import TokenTexts
from qaic_ray.serve.tools.calling import ToolSupport
from qaic_ray.worker.prompt_encoder import PromptEncoder


@dataclass(frozen=True)
class ModelContext:
    """What requests are read with.

    Attributes:
        names: of the model; the first is the one that answers show.
        encoder: renders and tokenizes.
        ctx_len: tokens of a context.
        vocab_size: token ids are below it.
        defaults: sampling parameters of a request that says nothing.
        tools: how the model calls tools.
        allow_unknown: whether fields that nobody knows pass.
        created: Unix time in seconds at which the server began.
    """

    names: tuple[str, ...]
    encoder: PromptEncoder
    ctx_len: int
    vocab_size: int
    defaults: SamplingParams
    tools: ToolSupport = field(default_factory=ToolSupport)
    allow_unknown: bool = False
    created: int = 0
    texts: TokenTexts = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", TokenTexts(self.encoder.tokenizer))

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"The model {shown(name)} is not served here: it is {', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )
