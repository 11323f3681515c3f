"""The form of a model's calls is found from its template."""

from __future__ import annotations

import pytest
from byte_tokens import byte_tokenizer
from tool_templates import FORM_OF, HERMES, LLAMA, MISTRAL, NAMED, PLAIN

from qaic_ray.errors import UsageError
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.serve.tools.calling import support_of
from qaic_ray.serve.tools.forms import call_form, find_form, template_with_tools

XML = "{{ tools }}<tool_call>\n<function=name>\n<parameter=city>"
TAGGED = "{{ tools }}<tool_call>{name}\n<arg_key>city</arg_key>"


def tokenizer_of(template: object, *special: str) -> Tokenizer:
    return Tokenizer(byte_tokenizer(*special), {"chat_template": template}, ())


@pytest.mark.parametrize("name", sorted(FORM_OF))
def test_the_form_is_found(name: str) -> None:
    template, form = FORM_OF[name]
    assert find_form(template) == form


@pytest.mark.parametrize("template", [XML, TAGGED, "", PLAIN, PLAIN + "<tool_call>", "{{ tools }}"])
def test_other_templates_have_no_known_form(template: str) -> None:
    assert find_form(template) is None


def test_a_special_token_decides_where_a_template_prints_no_call() -> None:
    assert find_form("{{ tools | tojson }}", {"[TOOL_CALLS]"}) == "mistral"
    assert find_form(PLAIN, {"[TOOL_CALLS]"}) is None


def test_variants() -> None:
    assert call_form("llama3_json", LLAMA).key == "parameters"
    assert call_form("llama3_json", '{"name": n, "arguments": a}').key == "arguments"
    assert call_form("mistral", MISTRAL).separator == ""
    assert call_form("mistral", NAMED).separator == "[ARGS]"


def test_the_template_for_tools_is_looked_at() -> None:
    several = {"default": PLAIN, "tool_use": HERMES}
    assert template_with_tools(several) == HERMES
    assert template_with_tools({"default": PLAIN}) == PLAIN
    assert template_with_tools(None) == template_with_tools({"rag": PLAIN}) == ""
    form = support_of("auto", tokenizer_of(several)).form
    assert form is not None
    assert form.name == "hermes"


def test_special_tokens_are_kept_where_a_call_needs_them() -> None:
    assert support_of("auto", tokenizer_of(MISTRAL, "[TOOL_CALLS]")).keeps_special_tokens
    assert not support_of("auto", tokenizer_of(HERMES, "<|im_end|>")).keeps_special_tokens
    assert not support_of("none", tokenizer_of(MISTRAL, "[TOOL_CALLS]")).keeps_special_tokens


def test_an_option_says_the_form() -> None:
    assert support_of("none", tokenizer_of(HERMES)).form is None
    form = support_of("hermes", tokenizer_of("{{ tools }}")).form
    assert form is not None
    assert form.name == "hermes"


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="it is auto, llama3_json, hermes, mistral, none"):
        support_of("pythonic", tokenizer_of(HERMES))
    with pytest.raises(UsageError, match="shows no tools: give another one"):
        support_of("hermes", tokenizer_of(PLAIN))
