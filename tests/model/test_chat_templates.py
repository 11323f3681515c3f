"""Conversations become what transformers' apply_chat_template makes of them, text and ids."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from awaited import joined
from chat_templates import CONVERSATIONS, KWARGS, TEMPLATES
from hypothesis import given
from hypothesis import strategies as st
from loaded_here import loaded_here
from tokenizer_folders import FOLDERS

from qaic_ray.errors import UsageError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.model import chat
from qaic_ray.model.chat import RESERVED, ChatTemplate
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import RunOptions
from qaic_ray.pipeline.job import job_from, run_request
from qaic_ray.pipeline.request import REQUEST_NAME, RunRequest
from qaic_ray.pipeline.run_step import check_chat_template
from qaic_ray.rows import ChatOptions

Conversation = list[dict[str, Any]]
HELLO = CONVERSATIONS["hello"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tokenizers are loaded and templates first rendered here: a start takes a second each."""
    monkeypatch.setattr(chat, "_why_never", lambda *_: None)
    with loaded_here():
        yield


def auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(open_checkpoint(str(folder), weights=False))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Tokenizer]]:
    """transformers' tokenizer and ours, of three folders that set other special tokens."""
    made = []
    names = ("extra-special-tokens-with-names", "special-tokens-are-split", "llama-class-of-pieces")
    for name in names:
        folder = tmp_path_factory.mktemp("chat")
        FOLDERS[name](folder)
        with loaded_here():
            made.append((auto_tokenizer(folder), ours(folder)))
    return made


def both(
    pair: tuple[Any, Tokenizer], template: str, messages: Conversation, options: ChatOptions
) -> tuple[Any, Any]:
    """Text and ids, or None where it is refused: the library's and ours."""
    truth, tokenizer = pair
    how = {
        "chat_template": template,
        "add_generation_prompt": options.add_generation_prompt,
        "continue_final_message": options.continue_final_message,
        **options.template_kwargs,
    }
    try:
        text = truth.apply_chat_template(messages, tokenize=False, **how)
        expected = text, truth.apply_chat_template(messages, **how).input_ids
    except Exception:  # noqa: BLE001  # a template is a program
        expected = None
    tokenizer = tokenizer.of_run(template, None)
    try:
        given = tokenizer.chat_template.render(messages, options), tokenizer.chat(messages, options)
    except UsageError:
        given = None
    return expected, given


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_the_librarys(
    no_child: None, pairs: list[tuple[Any, Tokenizer]], name: str
) -> None:
    how = [
        ChatOptions(begins, goes_on, kwargs)
        for begins, goes_on in [(True, False), (False, False), (False, True)]
        for kwargs in KWARGS
    ]
    for messages, options in itertools.product(CONVERSATIONS.values(), how):
        for pair in pairs:
            expected, given = both(pair, TEMPLATES[name], messages, options)
            assert given == expected


def test_most_of_these_are_rendered(no_child: None, pairs: list[tuple[Any, Tokenizer]]) -> None:
    outcomes = [
        both(pairs[0], template, messages, ChatOptions())[1]
        for template in TEMPLATES.values()
        for messages in CONVERSATIONS.values()
    ]
    assert 0.7 * len(outcomes) < sum(given is not None for given in outcomes) < len(outcomes)


EXPRESSIONS = st.sampled_from(
    [
        *("m.content", "m.role", "bos_token", "eos_token", "tools", "x", "loop.index", "'a\\n'"),
        *("m | tojson", "m.content | trim", "m.nothing", "messages | length", "m.content[1:]"),
        *("add_generation_prompt", "strftime_now('')", "namespace(a=1).a", "m.content is string"),
    ]
)
SPACES = st.sampled_from(["", " ", "\n", "  \n", "\t", "text", "\n\n "])
MARKS = st.sampled_from(["", "-", "+"])


@st.composite
def statements(draw: st.DrawFn, depth: int = 2) -> str:
    """A piece of a template: text, an expression, or a block of pieces."""
    kind = draw(st.sampled_from(["text", "value", "if", "for", "set", "generation", "comment"]))
    left, right = draw(MARKS), draw(MARKS)
    value, space = draw(EXPRESSIONS), draw(SPACES)
    if kind == "text" or depth == 0:
        return space
    if kind == "value":
        return f"{space}{{{{{left.replace('+', '')} {value} {right.replace('+', '')}}}}}"
    if kind == "comment":
        return f"{space}{{#{left} {value} {right}#}}"
    if kind == "set":
        return f"{space}{{%{left} set x = {value} {right}%}}"
    inner = "".join(draw(st.lists(statements(depth - 1), max_size=3)))
    head = {"if": f"if {value}", "for": "for m in messages", "generation": "generation"}[kind]
    return f"{space}{{%{left} {head} {right}%}}{inner}{{%{right} end{kind} {left}%}}"


@given(
    pieces=st.lists(statements(), min_size=1, max_size=5),
    messages=st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "system"]),
                "content": st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
            }
        ),
        min_size=1,
        max_size=4,
    ),
    begins=st.booleans(),
    goes_on=st.booleans(),
)
def test_generated_templates_too(
    pairs: list[tuple[Any, Tokenizer]],
    pieces: list[str],
    messages: Conversation,
    begins: bool,
    goes_on: bool,
) -> None:
    template = "{% set m = messages[0] %}" + "".join(pieces)
    options = ChatOptions(begins and not goes_on, goes_on)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "_why_never", lambda *_: None)
        expected, given = both(pairs[0], template, messages, options)
    assert given == expected


# -- where a template lies


@pytest.fixture
def simple(tmp_path: Path) -> Path:
    folder = tmp_path / "simple"
    folder.mkdir()
    FOLDERS["bytes-with-merges"](folder)
    return folder


def _in_settings(folder: Path, template: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


def _place_settings(folder: Path) -> None:
    _in_settings(folder, "settings")


def _place_list(folder: Path) -> None:
    _in_settings(folder, NAMED)


def _place_object(folder: Path) -> None:
    _in_settings(folder, {"default": "D", "tool_use": "T", "rag": "R"})


def _place_no_default(folder: Path) -> None:
    _in_settings(folder, [{"name": "tool_use", "template": "T"}])


def _place_file(folder: Path) -> None:
    _in_settings(folder, NAMED)
    (folder / "chat_template.jinja").write_text("file\n")


def _place_folder(folder: Path) -> None:
    _in_settings(folder, "settings")
    (folder / "chat_template.jinja").write_text("file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("folder")


def _place_folder_alone(folder: Path) -> None:
    _in_settings(folder, "settings")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("folder")


def _place_nowhere(folder: Path) -> None:
    assert not (folder / "chat_template.jinja").exists()


PLACES = [value for name, value in list(globals().items()) if name.startswith("_place_")]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_the_template_is_the_one_that_the_library_takes(
    no_child: None, simple: Path, place: Callable[[Path], None]
) -> None:
    place(simple)
    truth, tokenizer = auto_tokenizer(simple), ours(simple)
    for tools in (None, [], KWARGS[2]["tools"]):
        try:
            expected = truth.apply_chat_template(HELLO, tools=tools, tokenize=False)
        except ValueError:
            expected = None
        options = ChatOptions(False, False, {} if tools is None else {"tools": tools})
        try:
            given = tokenizer.chat_template.render(HELLO, options)
        except UsageError as error:
            assert "chat template" in str(error)  # noqa: PT017
            given = None
        assert given == expected


def test_a_processors_template_is_the_last_resort(no_child: None, simple: Path) -> None:
    (simple / "chat_template.json").write_text('{"chat_template": "old"}')
    assert ours(simple).chat_template.render(HELLO, ChatOptions()) == "old"


# -- the run's own


def test_the_date_is_the_runs() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y %H:%M:%S') }}")
    of_run = template.of_run(None, "2031-02-03T04:05:06")
    options = ChatOptions()
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(of_run.render(HELLO, options)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        joined(thread)
    assert set(seen) == {"03 Feb 2031 04:05:06"}
    now = datetime.strptime(template.render(HELLO, options), "%d %b %Y %H:%M:%S")
    assert abs((datetime.now() - now).total_seconds()) < 60


def test_in_a_macro_too_and_others_in_the_process_keep_theirs(no_child: None) -> None:
    text = "{% macro day() %}{{ strftime_now('%Y') }}{% endmacro %}{{ day() }}"
    assert ChatTemplate(text).of_run(None, "1999-01-01").render(HELLO, ChatOptions()) == "1999"
    from transformers import PreTrainedTokenizerBase

    tokenizer = PreTrainedTokenizerBase(chat_template=text)
    assert tokenizer.apply_chat_template(HELLO, tokenize=False) == str(datetime.now().year)


def test_a_template_of_the_runs_replaces_the_models(no_child: None) -> None:
    several = ChatTemplate({"default": "D", "tool_use": "T"})
    with_tools = ChatOptions(template_kwargs={"tools": []})
    assert several.render(HELLO, with_tools) == "T"
    assert several.of_run("own", None).render(HELLO, with_tools) == "own"


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_parameters_of_the_library_are_no_variables(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}'"):
        ChatTemplate("x").render(HELLO, ChatOptions(template_kwargs={name: 1}))


# -- programs of strangers


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ x | nothing }}", "nothing"),
        ("{% unknown %}", "unknown"),
        ("{% for m in messages %}", "end of template"),
    ],
)
def test_what_does_not_compile_is_said_before_any_conversation(template: str, named: str) -> None:
    with pytest.raises(UsageError, match=f"cannot be used: .*{named}") as caught:
        ChatTemplate(template).try_out(HELLO, ChatOptions())
    assert "\n" not in str(caught.value)


def test_a_run_hears_of_it_before_ray_starts(simple: Path) -> None:
    request = RunRequest("r", str(simple), Path("/q"), RunOptions(prompt="a", chat=True))
    with pytest.raises(UsageError, match="has no chat template: leave --chat"):
        check_chat_template(request)
    check_chat_template(request.with_run(chat_template="{{ messages[0].content }}"))
    _in_settings(simple, "{% if %}")
    with pytest.raises(UsageError, match="cannot be used: Expected an expression"):
        check_chat_template(request)
    check_chat_template(request.with_run(chat=False))


def test_a_job_that_goes_on_keeps_its_date(tmp_path: Path) -> None:
    begun = RunRequest("r", "m", Path("/q"), RunOptions(prompt="a", date="2031-02-03T04:05:06"))
    (tmp_path / REQUEST_NAME).write_text(begun.to_yaml())
    job = job_from({"name": "r", "model": {"name": "m"}, "run": {"prompt": "a"}}, source="x")
    assert run_request(job, tmp_path, retry_errors=False).run.date == begun.run.date
    fresh = run_request(job, None, retry_errors=False)
    assert yaml.safe_load(fresh.job_text)["run"]["date"] == fresh.run.date


BOMBS = {
    "time": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set ns = namespace(x='x' * 9999) %}"
    "{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_goes_off_in_the_child(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "RENDER_CPU_S", 1)
    template = ChatTemplate(BOMBS[name])
    for _ in range(2):  # the second time it is known
        with pytest.raises(UsageError, match="cannot be used: it takes more"):
            template.render(HELLO, ChatOptions())
        monkeypatch.setattr(chat, "ask_child", None)


def test_a_conversation_that_is_refused_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}ok"
    template = ChatTemplate(text)
    with pytest.raises(UsageError, match="refuses these messages: one only"):
        template.render(CONVERSATIONS["several"], ChatOptions())
    assert template.render(HELLO, ChatOptions()) == "ok"


def test_what_was_tried_out_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("tried once")
    template.try_out(HELLO, ChatOptions())
    monkeypatch.setattr(chat, "_tried", {})  # as another process
    monkeypatch.setattr(chat, "ask_child", None)
    assert template.render(HELLO, ChatOptions()) == "tried once"


def test_rendering_loads_no_torch(own_cache: Path) -> None:
    program = (
        "import sys; from qaic_ray.model.chat import *\n"
        "t = ChatTemplate('{{ messages[0].content }}')\n"
        "assert t.render([{'role': 'user', 'content': 'x'}], ChatOptions()) == 'x'\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stdout == "False\n", result.stderr


def test_threads_share_a_template(no_child: None) -> None:
    template = ChatTemplate(TEMPLATES["turns"], {"bos_token": "<s>"})
    alone = [template.render(messages, ChatOptions()) for messages in [HELLO, *[HELLO] * 3]]
    other = replace(template, special_tokens={"bos_token": "<t>"})
    assert [other.render(HELLO, ChatOptions()) for _ in alone] == alone
