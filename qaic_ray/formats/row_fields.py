"""The fields of a row beside its prompt, read in one place for every format.

- A field of ours (`SamplingParams`, `ChatOptions`), by our name or another program's: done. The
  others are vLLM, SGLang, TGI, llama.cpp, Ollama, transformers' generate and pipelines, the OpenAI
  interface and text-generation-webui.
- A field of another program's that would change the answer: refused by its name, unless its value
  changes nothing (`num_beams: 1`).
- A misspelt field of ours (`temprature`, `topK`): an error; ignoring it would give other answers
  than were asked for.
- Any other key is the user's own, and is ignored.

What is wrong with a field is a `RowError`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Number
from typing import Any, TypeVar

from qaic_ray.errors import RowError
from qaic_ray.files.documents import shown
from qaic_ray.sampling_params import FIELDS, MAX_NAME_CHARS

Document = Mapping[str, Any]
"""A row of input as a JSON object."""

T = TypeVar("T")

_MAX_DEPTH = 32

_JSON_TYPES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}

_OTHER_NAMES = {
    "max_tokens": (
        *("max_gen_len", "max_gen_toks", "max_new_tokens", "max_output_tokens"),
        *("max_tokens_to_sample", "n_predict", "num_predict"),
    ),
    "min_tokens": ("min_new_tokens",),
    "stop": (
        *("custom_stopping_strings", "stop_sequence", "stop_sequences", "stop_strings"),
        *("stop_words", "stopping_strings"),
    ),
    "include_stop_str_in_output": ("include_stop_str", "no_stop_trim"),
    "repetition_penalty": ("rep_pen", "repeat_penalty"),
    "seed": ("random_seed", "sampling_seed"),
    "n": ("num_return_sequences",),
    "logprobs": ("n_probs",),
}
ALIASES = {other: ours for ours, others in _OTHER_NAMES.items() for other in others}
"""Other programs' names for fields of ours."""

STRUCTURED = {
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
}
"""vLLM's former names, each of a kind of `structured_outputs`."""
RESPONSE_FORMAT = "response_format"
"""The OpenAI interface's name."""

UNLIMITED = ("n_predict", "num_predict")
"""Names under which a negative number means: until the context is full."""

CHAT = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
"""Fields of the chat template."""

NESTED = frozenset({
    "extra_body", "generate_kwargs", "generation_config", "generation_kwargs", "sampling_options",
    "sampling_params",
})  # fmt: skip
"""Names of objects that hold fields."""

MAYBE_NESTED = frozenset({"options", "parameters"})
"""Such names in Ollama and TGI; in a data set they may be anything."""

NO_EFFECT = frozenset({
    # Who asks, where it runs, and when.
    "cache_prompt", "cache_salt", "data_parallel_rank", "id_slot", "keep_alive", "metadata",
    "model", "priority", "prompt_cache_key", "prompt_cache_retention", "request_id", "rid",
    "safety_identifier", "service_tier", "session_id", "slot_id", "store", "stream_interval",
    "stream_options", "timings_per_token", "user",
    # What is given back beside the answer: more than is asked for.
    "details", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "post_sampling_probs", "return_dict_in_generate", "return_timings", "return_token_ids",
    "return_tokens",
    # How it is computed.
    "assistant_model", "cache_implementation", "f16_kv", "low_vram", "main_gpu", "num_batch",
    "num_ctx", "num_gpu", "num_keep", "num_thread", "n_keep", "numa", "prediction",
    "prompt_lookup_num_tokens", "num_assistant_tokens", "use_cache", "use_mlock", "use_mmap",
    # Of no effect where the answer is decoded without special tokens.
    "bos_token_id", "pad_token_id", "spaces_between_special_tokens",
    # Parts of a method that has a switch of its own, which is among those not offered.
    "dry_allowed_length", "dry_base", "dry_penalty_last_n", "dry_sequence_breaker",
    "dry_sequence_breakers", "dynatemp_exponent", "dynatemp_high", "dynatemp_low",
    "early_stopping", "mirostat_eta", "mirostat_tau", "smoothing_curve", "xtc_threshold",
})  # fmt: skip
"""Fields that change no answer; they are ignored."""


def _list_of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_template(value: object) -> bool:
    return isinstance(value, str) and ("{{" in value or "{%" in value)


def _is_json_format(value: object) -> bool:
    return value == "json" or isinstance(value, dict)


def _is_effort(value: object) -> bool:
    return value in ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def _is_thinking(value: object) -> bool:
    return isinstance(value, (bool, dict)) or _is_effort(value)


def not_offered(said: str, value: object, instead: str) -> RowError:
    """The error of a field that is refused."""
    return RowError(f'"{said}" is not offered (given: {shown(value)}): {instead}.')


@dataclass(frozen=True)
class NotOffered:
    """A field that is refused, unless its value changes nothing.

    Attributes:
        instead: what to do, as the end of a sentence.
        neutral: values that change nothing.
        meant: the type of a value that is this field, or a test for one; any other value is the
            user's own.
    """

    instead: str = "the answer would be another: leave it out"
    neutral: tuple[object, ...] = (False, "", [], {})
    meant: type | Callable[[Any], bool] = object

    def check(self, said: str, value: Any, *, only_ours: bool) -> None:
        """Refuse a value that changes something; with `only_ours` none is the user's own.

        Raises:
            RowError: naming the field as `said`.
        """
        meant, plain = self.meant, _as_number(value) if isinstance(value, str) else value
        is_meant = isinstance(plain, meant) if isinstance(meant, type) else meant(plain)
        if plain not in self.neutral and (only_ours or is_meant):
            raise not_offered(said, value, self.instead)


def _off(*neutral: object, instead: str = NotOffered.instead) -> NotOffered:
    """A method's number, which some values switch off."""
    return NotOffered(instead, neutral, Number)


_AS_GRAMMAR = 'write "structured_outputs": {"grammar": ...}'
_AS_SCHEMA = 'write "structured_outputs": {"json": ...}'
_AS_STRUCTURED = 'write "structured_outputs"'
_ONE_PATH = "answers are drawn, not searched for: leave it out"
_TEXT_ONLY = "only text can be answered"
_AS_PROMPT = 'give the text as "prompt"'
_NO_TOOLS = "no tools are called: leave it out"
_AS_MESSAGE = 'give "messages" with one of the role system'
_NO_ADAPTER = "one model answers: leave it out"
_WHOLE_TEXT = "penalties look at the whole text: leave it out"
_AS_KWARGS = 'write "chat_template_kwargs": {"enable_thinking": ...}'
_SHOWN_BESIDE = "a row has its prompt beside its text: leave it out"

_BY_REASON: dict[str, tuple[str, ...]] = {
    _AS_GRAMMAR: ("ebnf", "grammar", "grammar_string"),
    _AS_SCHEMA: ("json_schema",),
    _AS_STRUCTURED: ("guided_decoding", "guided_whitespace_pattern", "structural_tag"),
    NotOffered.instead: (
        *("ban_eos_token", "bad_words_ids"),
        *("begin_suppress_tokens", "control_vectors", "custom_logit_processor", "custom_params"),
        *("custom_token_bans", "eos_token_id", "exponential_decay_length_penalty"),
        *("force_words_ids", "forced_bos_token_id", "forced_eos_token_id"),
        *("logits_processor", "logits_processors", "negative_prompt", "penalize_nl"),
        *("sampler_order", "sampler_priority", "samplers", "sequence_bias", "suppress_tokens"),
        *("temperature_last", "token_healing", "truncate", "truncate_prompt_tokens"),
        *("truncation_length", "vllm_xargs", "watermark", "watermarking_config"),
        *("web_search_options", "dynamic_temperature"),
    ),
    _TEXT_ONLY: (
        *("audio", "audios", "image", "image_data", "image_url", "images", "mm_processor_kwargs"),
        *("multi_modal_data", "video", "videos"),
    ),
    _AS_PROMPT: (
        *("input_embeds", "input_ids", "inputs_embeds", "prompt_embeds", "prompt_token_ids"),
    ),
    _NO_TOOLS: ("function_call", "functions", "tools"),
    _NO_ADAPTER: (
        *("adapter", "adapter_id", "adapters", "lora", "lora_adapter", "lora_name", "lora_path"),
        *("lora_request",),
    ),
}

_OFF_AT_0 = (
    *("dry_multiplier", "dynatemp_range", "encoder_no_repeat_ngram_size", "epsilon_cutoff"),
    *("eta_cutoff", "mirostat", "mirostat_mode", "no_repeat_ngram_size", "penalty_alpha"),
    *("smoothing_factor", "top_a", "xtc_probability"),
)
_OFF_AT_1 = (
    *("encoder_repetition_penalty", "guidance_scale", "tfs", "tfs_z", "typical", "typical_p"),
)
_SEARCHES_OFF_AT_1 = ("beam_width", "length_penalty", "num_beam_groups", "num_beams")

NOT_OFFERED: dict[str, NotOffered] = {
    **{name: NotOffered(reason) for reason, names in _BY_REASON.items() for name in names},
    # Searches.
    **dict.fromkeys(_SEARCHES_OFF_AT_1, _off(1, instead=_ONE_PATH)),
    "diversity_penalty": _off(0, instead=_ONE_PATH),
    "use_beam_search": _off(False, instead=_ONE_PATH),
    # Methods of choosing tokens.
    **dict.fromkeys(_OFF_AT_0, _off(0)),
    **dict.fromkeys(_OFF_AT_1, _off(1)),
    "min_keep": _off(0, 1),
    **dict.fromkeys(("penalty_last_n", "repeat_last_n"), _off(-1, instead=_WHOLE_TEXT)),
    "repetition_penalty_range": _off(0, instead=_WHOLE_TEXT),
    "top_n_sigma": _off(-1, 0),
    # Where an answer ends, and what of it is shown.
    "detokenize": NotOffered("answers have their text: leave it out", (True,), bool),
    **dict.fromkeys(("echo", "return_full_text"), NotOffered(_SHOWN_BESIDE, meant=bool)),
    "max_length": _off(instead='it counts the prompt too: write "max_tokens" for the answer alone'),
    **dict.fromkeys(
        ("max_time", "t_max_predict_ms"),
        _off(0, instead='no answer ends by the clock: write "max_tokens"'),
    ),
    "min_length": _off(0, instead='it counts the prompt too: write "min_tokens" for the answer'),
    "clean_up_tokenization_spaces": NotOffered(meant=bool),
    "stream": NotOffered("a batch is answered in one piece: leave it out", meant=bool),
    "suffix": NotOffered("an answer only follows its prompt: leave it out", meant=str),
    # Probabilities.
    "decoder_input_details": NotOffered('write "logprobs": 0', meant=bool),
    "logprob_start_len": _off(-1, instead='write "prompt_logprobs" for those of the prompt'),
    "return_logprob": NotOffered('write "logprobs": 0', meant=bool),
    "return_tokens_as_token_ids": NotOffered(meant=bool),
    "top_logprobs_num": _off(0, instead='write "logprobs"'),
    "top_n_tokens": _off(0, instead='write "logprobs"'),
    # What the model gets.
    "add_bos_token": NotOffered("the tokenizer's own rule holds", (True,), bool),
    "chat_template": NotOffered("the model's own is used: leave it out"),
    "context": NotOffered(_AS_PROMPT, ([],), _list_of(Number)),
    "documents": NotOffered("write them into the messages", ([],), _list_of(dict)),
    "raw": NotOffered('a "prompt" goes as it stands unless the run says chat', meant=bool),
    **dict.fromkeys(("system", "system_prompt"), NotOffered(_AS_MESSAGE, meant=str)),
    "template": NotOffered("the model's own is used: leave it out", meant=_is_template),
    "enable_thinking": NotOffered(_AS_KWARGS, ()),
    "reasoning": NotOffered(meant=_is_thinking),
    "reasoning_effort": NotOffered(meant=_is_effort),
    **dict.fromkeys(("think", "thinking"), NotOffered(_AS_KWARGS, (), _is_thinking)),
    "verbosity": NotOffered(neutral=("medium", ""), meant=_is_effort),
    # Forms of answers.
    "format": NotOffered('write "response_format"', meant=_is_json_format),
    "modalities": NotOffered(_TEXT_ONLY, ([], ["text"]), list),
    "parallel_tool_calls": NotOffered(_NO_TOOLS, (False, True)),
    "tool_choice": NotOffered(_NO_TOOLS, ("auto", "none", "")),
}
"""Fields that are refused by name."""

SPECIAL = frozenset({
    "add_special_tokens", "best_of", "do_sample", "top_logprobs", RESPONSE_FORMAT, *STRUCTURED,
})  # fmt: skip
PROMPT = frozenset({"prompt", "messages"})
_NAMES = (*FIELDS, *ALIASES, *CHAT, *STRUCTURED, RESPONSE_FORMAT)
_KNOWN = frozenset({*_NAMES, *SPECIAL, *NESTED, *MAYBE_NESTED, *NOT_OFFERED})


def is_known(key: str) -> bool:
    """Whether a key is a field of ours or of another program's."""
    return key in _KNOWN


def holds_fields(key: str, value: Any) -> bool:
    """Whether a key is of an object that holds fields; `{"n": "north", "s": "south"}` does not."""
    if key not in MAYBE_NESTED or not isinstance(value, dict):
        return key in NESTED
    return any(
        is_known(inner) and not (inner == "n" and isinstance(item, str))
        for inner, item in value.items()
    )


def _as_number(text: str) -> Any:
    """A text that is a number or true or false, as that; any other text as it is."""
    try:
        value = json.loads(text.lower()) if len(text) <= MAX_NAME_CHARS else text
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def chat_value(said: str, key: str, value: Any) -> Any:
    """The checked value of a field of the chat template, which errors name as `said`."""
    if key != "chat_template_kwargs":
        return as_type(bool, f'"{said}"', value)
    if _is_deeper(as_type(dict, f'"{said}"', value), _MAX_DEPTH):
        raise RowError(f'"{said}" is nested more than {_MAX_DEPTH} levels deep.')
    try:
        check_unicode(said, json.dumps(value, ensure_ascii=False))
    except TypeError as error:
        raise RowError(f'"{said}" holds what JSON has not: {error}.') from error
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)):
        return False
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in inner)


@lru_cache(maxsize=1024)  # the rows of a file have the same keys
def mistake(key: str) -> str | None:
    """The error of a key that was probably meant for a field of ours; None for any other."""
    if is_known(key) or key in NO_EFFECT or len(key) > MAX_NAME_CHARS:
        return None
    plain = key.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, _NAMES, n=1, cutoff=0.88)
    if not near:
        return None
    name = ALIASES.get(near[0], near[0])
    return f'Unknown sampling field "{key}": write "{name}", or give a key of yours another name.'


def check_unicode(what: str, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"The {what} holds half of a surrogate pair, not a character.") from error


def json_type(value: object) -> str:
    """The type of a value, with its article."""
    if value is None:
        return "null"
    return _JSON_TYPES.get(type(value)) or f"a {type(value).__name__}"


def as_type(kind: type[T], what: str, value: object) -> T:
    """A value that must be a string, a list, an object, or true or false.

    Raises:
        RowError: it is not, naming it as `what`.
    """
    if not isinstance(value, kind):
        must = "true or false" if kind is bool else _JSON_TYPES[kind]
        raise RowError(f"{what} is {json_type(value)}, not {must}.")
    return value
