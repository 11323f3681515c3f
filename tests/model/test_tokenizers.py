"""Ids and texts of our tokenizer are those of transformers' AutoTokenizer, whatever the files."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loaded_here import loaded_here
from tokenizer_folders import FOLDERS, TEXTS
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from qaic_ray.engine.limits.grammars import GrammarGuide, Grammars
from qaic_ray.errors import CheckpointError, RowError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.model import chat
from qaic_ray.model import tokenizer as tokenizer_module
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.model.detokenizer import IncrementalText
from qaic_ray.model.tokenizer import Tokenizer, loaded_tokenizer
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """A start of a child a case would take a second each."""
    with loaded_here():
        yield


@pytest.fixture(scope="module")
def auto_tokenizer() -> Callable[[Path], Any]:
    from transformers import AutoTokenizer

    return lambda folder: AutoTokenizer.from_pretrained(folder, local_files_only=True)


def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(open_checkpoint(str(folder), weights=False))


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / request.param
    folder.mkdir()
    FOLDERS[request.param](folder)
    return folder


def test_ids_and_texts_are_the_librarys(
    folder: Path, auto_tokenizer: Callable[[Path], Any]
) -> None:
    truth, tokenizer = auto_tokenizer(folder), ours(folder)
    texts = [*TEXTS, *map("".join, itertools.pairwise(TEXTS))]
    words = [token for token in truth.get_added_vocab() if token]
    texts += [
        f"{a}{word}{b}" for word in words[:20] for a, b in [("", ""), ("a", "b"), (" ", "x ")]
    ]
    for text in texts:
        ids = truth(text).input_ids
        assert tokenizer.encode(text) == ids
        plain = truth(text, add_special_tokens=False).input_ids
        for skips in (True, False):
            shown = tokenizer.decode(plain, skips_special=skips)
            assert shown == truth.decode(plain, skip_special_tokens=skips)
            pieces = IncrementalText(tokenizer, skips_special=skips)
            assert pieces.push(plain) + pieces.finish() == shown
    assert tokenizer.vocab_size == len(truth)
    assert tokenizer.chat_template.special_tokens == truth.special_tokens_map


# -- grammars in its tokens

NOT_READ = {
    "spaces-of-words-are-cleaned-up",
    "whole-words-only",
    "unigram-pieces",
    "sentencepiece-file-of-unigrams",
}
"""Of decoders that llguidance does not know: WordPiece, none at all, and Metaspace."""
SPECIAL_BYTES = {"pieces-with-byte-fallback", "llama-class-of-pieces"}
"""Whose bytes are special tokens, which no text of an answer has."""


def spoken(guide: GrammarGuide) -> list[int]:
    """One walk through a grammar: what it forces, else the first token that may come."""
    tokens: list[int] = []
    while not guide.is_done:
        allowed = np.unpackbits(np.frombuffer(guide.allowed(), np.uint8), bitorder="little")
        forced = guide.forced()
        token = forced[0] if forced else int(np.flatnonzero(allowed)[0])
        assert allowed[token]
        guide.take(token)
        tokens.append(token)
    return tokens


def test_what_a_grammar_lets_a_row_say_is_its_text(folder: Path) -> None:
    tokenizer = ours(folder)
    grammars = Grammars(lambda: tokenizer.json_text, tokenizer.eos_ids, tokenizer.vocab_size)
    if folder.name in NOT_READ:
        with pytest.raises(RowError, match=r"llguidance cannot read its tokenizer .*leave it out"):
            grammars.guide(StructuredOutputs(regex="a"))
        return
    for text in ("yes", "a b", "it's done", '{"a": 1}', "é"):
        if folder.name not in SPECIAL_BYTES or text.isalpha():
            guide = grammars.guide(StructuredOutputs(choice=(text,)))
            assert tokenizer.decode(spoken(guide)) == text


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    ids=st.lists(st.integers(0, 450)),
)
def test_generated_texts_and_ids_are_the_librarys(
    pairs: list[tuple[Any, Tokenizer]], text: str, ids: list[int]
) -> None:
    for truth, tokenizer in pairs:
        assert tokenizer.encode(text) == truth(text).input_ids
        known = [id_ for id_ in ids if id_ < len(truth)]
        assert tokenizer.decode(known) == truth.decode(known, skip_special_tokens=True)


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory, auto_tokenizer: Callable[[Path], Any]
) -> list[tuple[Any, Tokenizer]]:
    made = []
    for name in ("added-tokens-of-every-flag", "sentencepiece-file", "unigram-pieces"):
        folder = tmp_path_factory.mktemp("generated")
        FOLDERS[name](folder)
        made.append((auto_tokenizer(folder), ours(folder)))
    return made


# -- what is kept


@pytest.fixture
def simple(tmp_path: Path) -> Path:
    folder = tmp_path / "simple"
    folder.mkdir()
    FOLDERS["bytes-without-merges"](folder)
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that transformers was asked to load."""
    seen: list[Path] = []
    real = chat.ask_child

    def ask(task: dict[str, Any], cpu_s: int) -> None:
        seen.append(Path(task["folder"]))
        real(task, cpu_s)

    monkeypatch.setattr(chat, "ask_child", ask)
    return seen


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"chat_template": "B", "eos_token": "x"}'),
        ("special_tokens_map.json", '{"eos_token": "<b>"}'),
        ("added_tokens.json", '{"<b>": 256}'),
        ("chat_template.jinja", "B"),
        ("additional_chat_templates/tool_use.jinja", "B"),
        ("config.json", '{"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"}'),
    ],
)
def test_another_file_is_another_tokenizer(
    simple: Path, loads: list[Path], name: str, content: str
) -> None:
    before = loaded_tokenizer(simple)
    assert loaded_tokenizer(simple) == before
    path = simple / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    after = loaded_tokenizer(simple)
    assert after != before
    assert len(loads) <= 2  # another test may have had this one kept


def test_a_template_is_kept_with_its_tokenizer(tmp_path: Path) -> None:
    templates = {}
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        FOLDERS["sentencepiece-file"](folder)
        (folder / "chat_template.jinja").write_text(name)
        templates[name] = ours(folder).chat_template.templates
    assert templates == {"one": "one", "two": "two"}


def test_weights_are_not_read_for_it(simple: Path) -> None:
    before = loaded_tokenizer(simple)
    (simple / "model.safetensors").write_bytes(b"other weights")
    assert loaded_tokenizer(simple) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "settings.json"])
def test_a_damaged_entry_is_made_again(simple: Path, loads: list[Path], name: str) -> None:
    kept = loaded_tokenizer(simple)
    (kept / name).write_text("{")
    loads.clear()
    assert ours(simple).encode("a") != []
    assert loads == [simple]


def test_loading_takes_no_torch(simple: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from qaic_ray.model.checkpoint import *\n"
        f"t = load_tokenizer(open_checkpoint({str(simple)!r}, weights=False)); t.encode('a')\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


# -- what cannot be read


def test_half_a_surrogate_pair_is_a_rows_error(simple: Path) -> None:
    with pytest.raises(RowError, match="surrogate"):
        ours(simple).encode("a\ud83d")


def test_a_folder_without_a_vocabulary_is_refused(simple: Path) -> None:
    (simple / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        ours(simple)


def test_the_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sp"
    folder.mkdir()
    FOLDERS["sentencepiece-file"](folder)
    real = tokenizer_module.find_spec
    monkeypatch.setattr(
        tokenizer_module, "find_spec", lambda name: None if name == "sentencepiece" else real(name)
    )
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"pip install 'qaic-ray\[sentencepiece\]'"):
        ours(folder)


ODD_FILES = [
    ("tokenizer.json", "{}", r"tokenizer\.json"),
    ("tokenizer.json", "[" * 20_000, r"tokenizer\.json"),
    ("tokenizer.json", "[1]", r"tokenizer\.json"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}}}', r"tokenizer\.json"),
    ("tokenizer_config.json", "[1]", r"tokenizer_config\.json must hold a JSON object"),
    ("tokenizer_config.json", "{", r"tokenizer_config\.json is not JSON"),
    ("tokenizer_config.json", '{"bos_token": 7}', r"tokenizer_config\.json: bos_token"),
    ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
    ("tokenizer_config.json", '{"extra_special_tokens": 3}', "extra_special_tokens"),
    ("tokenizer_config.json", '{"tokenizer_class": 3}', "tokenizer_class"),
    ("special_tokens_map.json", "7", r"special_tokens_map\.json"),
    (
        "special_tokens_map.json",
        '{"additional_special_tokens": [{"content": "x"}]}',
        "transformers cannot read",
    ),
    ("added_tokens.json", "[]", r"added_tokens\.json"),
    ("chat_template.jinja", b"\xff\xfe\x00", r"chat_template\.jinja is UTF-16"),
    ("chat_template.jinja", b"\xc3(", r"chat_template\.jinja is not UTF-8"),
    ("chat_template.json", "[1]", r"chat_template\.json"),
]


@pytest.mark.parametrize(("name", "content", "named"), ODD_FILES)
def test_an_odd_file_is_one_sentence(
    simple: Path, name: str, content: str | bytes, named: str
) -> None:
    (simple / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=named) as caught:
        ours(simple)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def values(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON document, as a container and a key in it."""
    keys = list(document) if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from values(document[key])


def test_a_folder_with_any_value_changed_is_a_tokenizer_or_a_sentence(simple: Path) -> None:
    (simple / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    config = json.loads((simple / "tokenizer_config.json").read_text())
    config |= {"eos_token": "</s>", "chat_template": [{"name": "default", "template": "x"}]}
    (simple / "tokenizer_config.json").write_text(json.dumps(config))
    _save_small(simple / "tokenizer.json")
    (simple / "added_tokens.json").write_text('{"<y>": 2}')
    outcomes = {"read": 0, "refused": 0}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = simple / name
        whole = path.read_text()
        num_places = len(list(values(json.loads(whole))))
        for place, value in itertools.product(range(num_places), [None, [], {}, -1, "x", 1e9]):
            document = json.loads(whole)
            container, key = list(values(document))[place]
            container[key] = value
            path.write_text(json.dumps(document))
            outcomes[_read_or_refused(simple)] += 1
        path.write_text(whole)
    assert min(outcomes.values()) > 20


def _save_small(path: Path) -> None:
    backend = Backend(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    backend.save(str(path))


def _read_or_refused(folder: Path) -> str:
    try:
        ours(folder)
    except CheckpointError as error:
        return "refused" if "\n" not in str(error) else "refused in several lines"
    return "read"
