"""The page of rows: the fields that a prompt may have, and those that its answer has."""

from __future__ import annotations

import json
from collections.abc import Iterator

from qaic_ray.contract import MAX_SIZE
from qaic_ray.formats.json_rows import Origin, response_line
from qaic_ray.formats.row_fields import ALIASES, NO_EFFECT, NOT_OFFERED, SPECIAL, NotOffered
from qaic_ray.formats.tables import row_schema
from qaic_ray.option_types import OptionValue, options_of
from qaic_ray.reference.markdown import (
    Fields,
    Note,
    block,
    code,
    field_table,
    page,
    section,
    table,
    value,
)
from qaic_ray.rows import ErrorClass, FinishReason, Prompt, Row
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.shipped.job_schema import sample_of

PROMPT: Fields = {
    "prompt": Note("The text to go on from. Either this or `messages` is needed.", "Why is it so?"),
    "messages": Note(
        "A conversation: each turn has a `role` and a `content`. It always goes through the "
        "model's chat template.",
        [{"role": "user", "content": "Why is it so?"}],
    ),
    "id": Note("A text or whole number of yours, which the answer has too.", "q-17"),
    "continue_final_message": Note("Go on with the last message of the conversation.", True),
    "add_generation_prompt": Note(
        "End the conversation with the beginning of the assistant's answer. The default is true.",
        False,
    ),
    "chat_template_kwargs": Note("Variables for the chat template.", {"enable_thinking": False}),
    "response_format": Note(
        "The form of an answer, as in the OpenAI interface; `structured_outputs` says the same.",
        {"type": "json_object"},
    ),
    "guided_choice": Note("The answer is one of these texts (vLLM's former name).", ["yes", "no"]),
    "guided_grammar": Note("The answer follows this grammar.", 'start: "yes" | "no"'),
    "guided_json": Note("The answer follows this JSON schema.", {"type": "object"}),
    "guided_json_object": Note("The answer is a JSON object.", True),
    "guided_regex": Note("The answer matches this regex.", "yes|no"),
    "top_logprobs": Note("With `logprobs: true`: so many likeliest tokens each.", 5),
    "do_sample": Note("`false` is temperature 0; `true` wants a `temperature`.", False),
    "best_of": Note("Allowed where it is 1, or as much as `n`.", 1),
    "add_special_tokens": Note(
        "Allowed where it changes nothing: true for a prompt, false for a conversation.", True
    ),
}
"""Fields of a row of the input that `SamplingParams` does not have."""

ROW: Fields = {
    "index": Note("Place of the row in the input, counted from 0.", 17),
    "id": Note("The row's own id; null where it has none.", "q-17"),
    "prompt": Note("The prompt; of a conversation the user's last message.", "Why is it so?"),
    "messages": Note(
        "The conversation, where the row is one.", [{"role": "user", "content": "Why is it so?"}]
    ),
    "text": Note("The answer; empty where there is none.", " It is so for two reasons."),
    "token_ids": Note("The tokens of the answer, an EOS included.", [632, 314, 588, 2]),
    "finish_reason": Note(
        "Why the answer ended: `stop` (EOS, a stop token or a stop text), `length` (its most "
        "tokens, or a full context), `error`, or `abort` (cancelled).",
        "stop",
    ),
    "stop_reason": Note(
        "The stop text that ended the answer, or the stop token where that is not EOS.", "User:"
    ),
    "prompt_tokens": Note("Tokens that the model was given.", 12),
    "reused_tokens": Note("Tokens of the prompt that a slot of the card held already.", 8),
    "generated_tokens": Note("Tokens of all answers of the row.", 4),
    "ttft_s": Note("From the row's entry into the engine to its first token.", 0.21, "seconds"),
    "decode_s": Note("From the first token to the last.", 0.06, "seconds"),
    "queue_s": Note("From `started_at` to the row's first step.", 0.004, "seconds"),
    "started_at": Note(
        "When the attempt that answered came to its card, by that machine's clock.",
        1764396403.2,
        "Unix time, seconds",
    ),
    "ended_at": Note(
        "When its last token was there, by the same clock.", 1764396403.5, "Unix time, seconds"
    ),
    "worker": Note("The card, part of a card, or group of cards that answered.", "card 3"),
    "attempts": Note("How often the row was given to a card.", 1),
    "logprobs": Note(
        "Where they were asked for: natural logs of each token of the answer, and of the likeliest "
        "ones.",
        [{"token_id": 632, "logprob": -0.1, "top": [{"token_id": 632, "logprob": -0.1}]}],
    ),
    "prompt_logprobs": Note(
        "Where they were asked for: the same of the prompt, null for its first token.",
        [None, {"token_id": 314, "logprob": -2.5, "top": []}],
    ),
    "choices": Note(
        "All answers, where `n` is more than 1; the row's own text and tokens are the first one's.",
        [{"index": 0, "text": " It is.", "token_ids": [632, 2], "finish_reason": "stop"}],
    ),
    "error": Note("Why there is no answer, in a sentence.", "The prompt is empty."),
    "error_class": Note(
        "Of an error: `malformed` (the input has no prompt there), `refused` (this model and QPC "
        "cannot answer it as asked), `device` (a card failed at each attempt), `cancelled`.",
        "malformed",
    ),
}
"""Keys of a line of outputs.jsonl; those without a value are left out, except `id`."""


def rows_page() -> str:
    """docs/reference/rows.md."""
    return page(
        "Rows",
        "A run reads rows of prompts, and writes a row of answers for each of them, in the same "
        "order.",
        *_rows_in(),
        *_rows_out(),
    )


def _rows_in() -> Iterator[Iterator[str]]:
    yield section(
        "Rows in",
        "A row of JSONL is an object with these fields. In CSV, TSV and parquet each field is "
        "a column. A text file has a prompt on each line. A row's own fields go before what "
        "the run says. Any other key is yours, and is not read. A misspelt field is an error "
        "of the row.",
        field_table(PROMPT),
    )
    yield section(
        "How tokens are chosen",
        "The names and meanings are vLLM's and the OpenAI interface's.",
        table(("field", "meaning", "default", "allowed", "example"), _sampling()),
        level=3,
    )
    yield section(
        "Other programs' names",
        "These are taken too.",
        table(
            ("name", "means"), ((code(name), code(ours)) for name, ours in sorted(ALIASES.items()))
        ),
        level=3,
    )
    yield section(
        "Fields that are refused",
        "They would change the answer, and no card can do what they say. The row is an error "
        "unless the value changes nothing.",
        table(("field", "what to do"), ((code(n), f.instead) for n, f in _refused())),
        level=3,
    )
    yield section(
        "Fields that change nothing",
        f"These are known and passed over: {', '.join(map(code, sorted(NO_EFFECT)))}.",
        level=3,
    )


def _rows_out() -> Iterator[Iterator[str]]:
    yield section(
        "Rows out: outputs.jsonl and errors.jsonl",
        "`outputs.jsonl` has a line of JSON for each row of the input, in its order. "
        "`errors.jsonl` has the lines of those rows that have no answer. A key without a value "
        "is left out, except `id`.",
        field_table(ROW),
        block("json", json.dumps(sample_row().to_json(), ensure_ascii=False)),
        block("json", json.dumps(failed_row().to_json(), ensure_ascii=False)),
    )
    yield section(
        "openai_output.jsonl and openai_error.jsonl",
        "`--output-format openai` writes the answers as lines of the OpenAI batch format. A "
        "prompt becomes a `text_completion`, a conversation a `chat.completion`.",
        block("json", json.dumps(_response(sample_row()), ensure_ascii=False, indent=2)),
        "A row without an answer stands in the other file. Its `code` is `request_failed` "
        "where a card failed, else `invalid_request`.",
        block("json", json.dumps(_response(failed_row()), ensure_ascii=False, indent=2)),
    )
    yield section(
        "outputs.parquet",
        "`--output-format parquet` writes a table with a typed column for each key of a row. "
        "`stop_reason` is two columns, since it is a text or a token.",
        table(("column", "type"), ((code(f.name), code(_type(f.type))) for f in row_schema())),
    )


def _type(kind: object) -> str:
    """A column's type; versions of pyarrow have other names for what a list holds."""
    return str(kind).replace("item: ", "").replace("element: ", "")


def _sampling() -> Iterator[tuple[str, ...]]:
    for name, entry in options_of(SamplingParams).items():
        field = SamplingParams.__pydantic_fields__[name]  # type: ignore[attr-defined]
        default = field.default if not isinstance(field.default, tuple) else list(field.default)
        shown = "the run's seed" if name == "seed" else value(default)
        example = sample_of(entry, OptionValue(field), field.default)
        allowed = entry.allowed.replace(f" to {MAX_SIZE}", "")
        yield code(name), entry.help, shown, allowed, value(example)


def _refused() -> Iterator[tuple[str, NotOffered]]:
    return iter(sorted((n, f) for n, f in NOT_OFFERED.items() if n not in SPECIAL))


def sample_row() -> Row:
    """A row with an answer."""
    return Row(
        index=17,
        id="q-17",
        prompt="Why is it so?",
        text=" It is so for two reasons.",
        token_ids=(632, 314, 588, 2),
        finish_reason=FinishReason.STOP,
        prompt_tokens=12,
        ttft_s=0.21,
        decode_s=0.06,
        queue_s=0.004,
        started_at=1764396403.2,
        ended_at=1764396403.5,
        worker="card 3",
    )


def failed_row() -> Row:
    """A row without one."""
    prompt = Prompt(18, "", "q-18")
    said = "prompts.jsonl line 19: The prompt is empty."
    return Row.failed(prompt, said, attempts=0, error_class=ErrorClass.MALFORMED)


def _response(row: Row) -> dict[str, object]:
    origin = Origin("mine-20261129-090500", "smollm2-135m", 1764396403, str)
    return response_line(row.to_json(), origin)
