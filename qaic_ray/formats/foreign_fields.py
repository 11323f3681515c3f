"""Tables of the fields that other programs take beside a prompt, and what is done with each here.

They are of vLLM, SGLang, TGI, llama.cpp, Ollama, transformers' generate and pipelines, the OpenAI
interface and text-generation-webui. A field in none of these tables is the user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any

ALIASES = {
    "max_gen_len": "max_tokens",
    "max_gen_toks": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_tokens_to_sample": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "custom_stopping_strings": "stop",
    "stop_sequence": "stop",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stop_words": "stop",
    "stopping_strings": "stop",
    "include_stop_str": "include_stop_str_in_output",
    "no_stop_trim": "include_stop_str_in_output",
    "rep_pen": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
    "random_seed": "seed",
    "sampling_seed": "seed",
    "num_return_sequences": "n",
    "n_probs": "logprobs",
}
"""Other programs' names for fields of ours."""

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


def _is_count(value: object) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool)


def _is_list_of_numbers(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, Number) for item in value)


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _is_template(value: object) -> bool:
    return isinstance(value, str) and ("{{" in value or "{%" in value)


def _is_json_format(value: object) -> bool:
    return value == "json" or isinstance(value, dict)


def _is_effort(value: object) -> bool:
    return value in ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def _is_thinking(value: object) -> bool:
    return isinstance(value, (bool, dict)) or _is_effort(value)


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

    def is_meant(self, value: object) -> bool:
        """Whether a value is this field, and not the user's own."""
        if isinstance(self.meant, type):
            return isinstance(value, self.meant)
        return self.meant(value)


def _off(*neutral: object, instead: str = NotOffered.instead) -> NotOffered:
    """A method's number, which some values switch off."""
    return NotOffered(instead, neutral, Number)


_FREE_FORM = "answers are free text: leave it out"
_ONE_PATH = "answers are drawn, not searched for: leave it out"
_TEXT_ONLY = "only text can be answered"
_AS_PROMPT = 'give the text as "prompt"'
_NO_TOOLS = "no tools are called: leave it out"
_AS_MESSAGE = 'give "messages" with one of the role system'
_NO_ADAPTER = "one model answers: leave it out"

_BY_REASON: dict[str, tuple[str, ...]] = {
    _FREE_FORM: (
        *("grammar", "grammar_string", "guided_choice", "guided_decoding", "guided_grammar"),
        *("guided_json", "guided_regex", "json_schema", "structural_tag", "structured_outputs"),
        "ebnf",
    ),
    NotOffered.instead: (
        *("allowed_token_ids", "ban_eos_token", "bad_words", "bad_words_ids"),
        *("begin_suppress_tokens", "control_vectors", "custom_logit_processor", "custom_params"),
        *("custom_token_bans", "eos_token_id", "exponential_decay_length_penalty"),
        *("force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "logit_bias"),
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
    "penalty_last_n": _off(-1, instead="penalties look at the whole text: leave it out"),
    "repeat_last_n": _off(-1, instead="penalties look at the whole text: leave it out"),
    "repetition_penalty_range": _off(0, instead="penalties look at the whole text: leave it out"),
    "top_n_sigma": _off(-1, 0),
    # Where an answer ends, and what of it is shown.
    "detokenize": NotOffered("answers have their text: leave it out", (True,), bool),
    "echo": NotOffered("a row has its prompt beside its text: leave it out", meant=bool),
    "max_length": _off(instead='it counts the prompt too: write "max_tokens" for the answer alone'),
    "max_time": _off(0, instead='no answer ends by the clock: write "max_tokens"'),
    "min_length": _off(0, instead='it counts the prompt too: write "min_tokens" for the answer'),
    "return_full_text": NotOffered(
        "a row has its prompt beside its text: leave it out", meant=bool
    ),
    "skip_special_tokens": NotOffered(
        "special tokens are not shown, token_ids has them: leave it out", (True,), bool
    ),
    "clean_up_tokenization_spaces": NotOffered(meant=bool),
    "stream": NotOffered("a batch is answered in one piece: leave it out", meant=bool),
    "suffix": NotOffered("an answer only follows its prompt: leave it out", meant=str),
    "t_max_predict_ms": _off(0, instead='no answer ends by the clock: write "max_tokens"'),
    # Probabilities.
    "decoder_input_details": NotOffered('write "logprobs": 0', meant=bool),
    "logprob_start_len": _off(-1, instead='write "logprobs" for those of the answer'),
    "prompt_logprobs": NotOffered('write "logprobs" for those of the answer', (), _is_count),
    "return_logprob": NotOffered('write "logprobs": 0', meant=bool),
    "return_tokens_as_token_ids": NotOffered(meant=bool),
    "top_logprobs_num": _off(0, instead='write "logprobs"'),
    "top_n_tokens": _off(0, instead='write "logprobs"'),
    # What the model gets.
    "add_bos_token": NotOffered("the tokenizer's own rule holds", (True,), bool),
    "chat_template": NotOffered("the model's own is used: leave it out"),
    "context": NotOffered(_AS_PROMPT, ([],), _is_list_of_numbers),
    "documents": NotOffered("write them into the messages", ([],), _is_list_of_objects),
    "raw": NotOffered('a "prompt" goes as it stands unless the run says chat', meant=bool),
    "system": NotOffered(_AS_MESSAGE, meant=str),
    "system_prompt": NotOffered(_AS_MESSAGE, meant=str),
    "template": NotOffered("the model's own is used: leave it out", meant=_is_template),
    "enable_thinking": NotOffered('write "chat_template_kwargs": {"enable_thinking": ...}', ()),
    "reasoning": NotOffered(meant=_is_thinking),
    "reasoning_effort": NotOffered(meant=_is_effort),
    "think": NotOffered('write "chat_template_kwargs": {"enable_thinking": ...}', (), _is_thinking),
    "thinking": NotOffered(
        'write "chat_template_kwargs": {"enable_thinking": ...}', (), _is_thinking
    ),
    "verbosity": NotOffered(neutral=("medium", ""), meant=_is_effort),
    # Forms of answers.
    "format": NotOffered(_FREE_FORM, meant=_is_json_format),
    "modalities": NotOffered(_TEXT_ONLY, ([], ["text"]), list),
    "parallel_tool_calls": NotOffered(_NO_TOOLS, (False, True)),
    "response_format": NotOffered(_FREE_FORM, ({}, {"type": "text"})),
    "tool_choice": NotOffered(_NO_TOOLS, ("auto", "none", "")),
}
"""Fields that are refused by name."""
