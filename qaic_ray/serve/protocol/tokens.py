"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from qaic_ray.formats.row_fields import check_unicode
from qaic_ray.serve.api_errors import bad_request
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.fields import body_of, check_ids, check_others, refusing
from qaic_ray.serve.protocol.models import ChatBody, DetokenizeBody, TokenizeBody
from qaic_ray.serve.protocol.requests import chat_ids


def tokenized(body: TokenizeBody, context: ModelContext) -> dict[str, Any]:
    """Token ids of a text, or of a conversation.

    Raises:
        ApiError: it has neither, or both, or cannot be rendered.
    """
    context.check_model(body.model)
    check_others(body, context)
    if (body.prompt is None) is (body.messages is None):
        raise bad_request("Give one of prompt and messages.", "prompt")
    if body.prompt is not None:
        with refusing("prompt"):
            check_unicode("prompt", body.prompt)
            adds = body.add_special_tokens is not False
            ids = context.encoder.tokenizer.encode(body.prompt, adds_special=adds)
    else:
        left_out = {"prompt", "return_token_strs", "add_special_tokens"}
        chat = body.model_dump(exclude=left_out, exclude_none=True)
        ids = list(chat_ids(body_of(ChatBody, chat), context))
    strings = [context.texts.text(one) for one in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": context.ctx_len,
        "tokens": ids,
        "token_strs": strings,
    }


def detokenized(body: DetokenizeBody, context: ModelContext) -> dict[str, Any]:
    """The text of token ids, special ones left out.

    Raises:
        ApiError: one is not the model's.
    """
    context.check_model(body.model)
    check_others(body, context)
    check_ids(body.tokens, context, "tokens")
    return {"prompt": context.encoder.tokenizer.decode(body.tokens)}
