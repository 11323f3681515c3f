"""Fields that requests have in common: their types, what is not offered, sampling, prompts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qaic_ray.errors import RowError, UsageError
from qaic_ray.files.documents import first_error, place_of, shown
from qaic_ray.formats import row_fields
from qaic_ray.formats.row_fields import check_unicode
from qaic_ray.rows import Prompt
from qaic_ray.sampling_params import MAX_LOGPROBS, SamplingParams
from qaic_ray.sampling_params.structured_outputs import document_of_response_format
from qaic_ray.serve.api_errors import bad_request
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.models import SAMPLING, ChatBody, SamplingBody

Body = TypeVar("Body", bound=BaseModel)


def body_of(kind: type[Body], document: Mapping[str, Any]) -> Body:
    """A body's fields, of the right types.

    Raises:
        ApiError: 400, with the field that is wrong.
    """
    with refusing():
        check_unicode("name of a field", "".join(document))
    try:
        return kind.model_validate(dict(document))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = place_of(first["loc"]) or None
        if first["type"] == "missing":
            raise bad_request(f"{name} is missing.", name) from error
        raise bad_request(first_error(error), str(first["loc"][0])) from error
    except RecursionError as error:
        raise bad_request("The body is nested too deep.") from error


def check_others(body: BaseModel, context: ModelContext) -> None:
    """Refuse the fields of a body that its model does not have, unless they change nothing."""
    for name, value in (body.model_extra or {}).items():
        if value is None or name in row_fields.NO_EFFECT:
            continue
        if name in row_fields.NOT_OFFERED:
            with refusing(name):
                row_fields.NOT_OFFERED[name].check(name, value, only_ours=True)
        elif not context.allow_unknown:
            known = [*type(body).model_fields, *row_fields.NO_EFFECT]
            near = difflib.get_close_matches(name[:64], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out."
            raise bad_request(f"Unknown field {shown(name)}: {hint}", name, "unknown_field")


class refusing:  # noqa: N801 - used like a function
    """A context in which an error of a row's fields is one of the request."""

    def __init__(self, param: str | None = None) -> None:
        self._param = param

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RowError | UsageError):
            said = str(error)
            first = said.partition(" ")[0].strip('"')
            known = first in SamplingBody.model_fields or first in SAMPLING
            raise bad_request(said, self._param or (first if known else None)) from error


def stream_fields(body: SamplingBody) -> dict[str, Any]:
    options = body.stream_options
    if options is not None and not body.stream:
        raise bad_request("stream_options is for stream: true.", "stream_options")
    return {
        "stream": bool(body.stream),
        "include_usage": options is not None and options.include_usage,
        "continuous_usage": options is not None and options.continuous_usage_stats,
        "shows_ids": bool(body.return_token_ids),
        "ids_as_tokens": bool(body.return_tokens_as_token_ids),
    }


def sampling_fields(body: SamplingBody) -> dict[str, Any]:
    """The fields of `SamplingParams` that a body has, by our names."""
    given = {name: getattr(body, name) for name in sorted(SAMPLING & body.model_fields_set)}
    fields = {name: value for name, value in given.items() if value is not None}
    if body.response_format is not None:
        if body.structured_outputs is not None:
            raise bad_request(
                "response_format and structured_outputs both say the answer's form: give one.",
                "response_format",
            )
        with refusing("response_format"):
            form = document_of_response_format(body.response_format)
        if form is not None:
            fields["structured_outputs"] = form
    return fields


def checked_params(
    context: ModelContext, fields: Mapping[str, Any], logprobs_name: str = "logprobs"
) -> SamplingParams:
    """The sampling parameters of fields, with the model's own defaults for the others.

    Args:
        context: has the defaults.
        fields: by our names.
        logprobs_name: what the request calls `logprobs`.

    Raises:
        ApiError: naming the field that is wrong.
    """
    asked = fields.get("logprobs")
    if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
        raise bad_request(
            f"{logprobs_name} is {shown(asked)}: it is from 0 to {MAX_LOGPROBS}.", logprobs_name
        )
    with refusing():
        return context.defaults.updated(fields)


def prompt_of(
    number: int,
    ids: Sequence[int],
    params: SamplingParams,
    *,
    context: ModelContext,
    body: SamplingBody,
) -> Prompt:
    """A prompt of token ids that fits the context with its answer.

    Its text is not given along: nobody behind the server reads it.
    """
    keep = body.truncate_prompt_tokens
    if keep is not None:
        if keep < -1 or keep == 0:
            raise bad_request(
                "truncate_prompt_tokens is a number of tokens, or -1 for a whole context.",
                "truncate_prompt_tokens",
            )
        ids = ids[-(context.ctx_len if keep == -1 else keep) :]
    name = "messages" if isinstance(body, ChatBody) else "prompt"
    if not ids:
        raise bad_request("The prompt is empty: it has no token to start from.", name)
    check_ids(ids, context, name)
    room = context.ctx_len - len(ids) + 1  # the last token of an answer is never fed back
    wanted = params.max_tokens if body.model_fields_set & _LENGTHS else None
    if room < 1 or (wanted is not None and wanted > room):
        beside = f" and {wanted} of the answer" if wanted is not None else ""
        raise bad_request(
            f"This model's context has {context.ctx_len} tokens, and {len(ids)} of the prompt"
            f"{beside} were asked for: shorten one of them.",
            name,
            "context_length_exceeded",
        )
    return Prompt(number, "", sampling=params, stream=bool(body.stream), token_ids=tuple(ids))


_LENGTHS = {"max_tokens", "max_completion_tokens"}


def check_ids(ids: Sequence[int], context: ModelContext, param: str) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        ApiError: naming the field.
    """
    for wrong in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= wrong < context.vocab_size:
            raise bad_request(
                f"{param} holds the token id {wrong}: the model has 0 to {context.vocab_size - 1}.",
                param,
            )
