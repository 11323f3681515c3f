"""Tokenizers out of GGUF files: the ids of llama.cpp for the same file, and so of transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf_models import GgufModel, opened, random_model
from llama_cpp import LlamaCpp
from loaded_here import loaded_here
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from qaic_ray.errors import CheckpointError
from qaic_ray.model.checkpoint import load_tokenizer
from qaic_ray.model.gguf_file import GgufFile
from qaic_ray.model.gguf_tokenizer import SPLITTINGS, write_tokenizer
from qaic_ray.model.tokenizer import loaded_tokenizer, open_tokenizer
from qaic_ray.rows import ChatOptions

CORPUS = [
    "def read(path: Path, *, size: int = 0) -> dict[str, int]:",
    "        return {name: len(text) for name, text in found.items() if size <= 1234}",
    "don't WE'LL They've it's I'd the of and hello world    \t\t\n\n\n  \r\n",
    "Größe naïve façade 123 4567 89 ΑΒΓ αβγ привет мир 你好世界 こんにちは",
    "x=[1,2]+{a:b};  // foo_bar-baz$ <=> ^~|` and the theory of the others",
] * 8
LETTERS = (
    " \t\n\r'.,!?$+<=>^~|`/-_()[]{}0123456789abcdefABCDEFéßÄΩжЖ你好の🙂½٣́\u00a0\u3000stdmrvlhoe"
)
TEXTS = [
    "hello world",
    "don't WE'LL They've I'm it's 'S",
    "12345 6789 1 22 333 v1.2.3",
    "a  b   c    d\t\te\n\n\nf \r\n g  ",
    "Größe naïve ΑΒΓ αβγ привет мир 你好世界 こんにちは 🙂👩‍👩‍👧",
    "<s>hi</s> there<|im_end|>x <tool> y   <|im_end|>",
    "  two spaces first",
    "trailing  ",
    "▁under ▁x",
    "<0x41>",
    "",
]
SPECIAL = {"<|im_end|>": 3, "<tool>": 4, "   ": 4}


def texts(count: int = 150) -> list[str]:
    drawn = random.Random(0)
    return TEXTS + ["".join(drawn.choices(LETTERS, k=drawn.randrange(1, 30))) for _ in range(count)]


def trained(splitter: Any, alphabet: list[str]) -> tuple[list[str], list[str]]:
    """Tokens in the order they were made, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokens, merges = trained(splitter, pre_tokenizers.ByteLevel.alphabet())
    special = {"<s>": 3, "</s>": 3, **SPECIAL}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": [1] * len(tokens) + list(special.values()),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }


@pytest.fixture(scope="module")
def sentencepiece() -> dict[str, Any]:
    tokens, _ = trained(pre_tokenizers.Metaspace(), [])
    pieces = [t for t in tokens if len(t) > 1] + [t for t in tokens if len(t) == 1]
    first = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    kinds = [*first.values(), *[1] * len(pieces), *SPECIAL.values()]
    scores = [0.0] * len(first) + [-float(n) for n in range(len(pieces))] + [-1000.0] * 3
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*first, *pieces, *SPECIAL],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
    }


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    with LlamaCpp() as running:
        yield running


@pytest.fixture
def loads_here() -> Iterator[None]:
    """Other tests have tokenizers read as users do, in a child."""
    with loaded_here():
        yield


def check(llama_cpp: LlamaCpp, folder: Path, keys: dict[str, Any], asked: list[str]) -> None:
    """Ids of llama.cpp, of ours and of transformers, and texts that come back."""
    num_tokens = len(keys["tokenizer.ggml.tokens"])
    model = GgufModel.of(random_model("Llama", vocab_size=num_tokens, num_hidden_layers=1), "llama")
    model.keys = {k: v for k, v in model.keys.items() if not k.startswith("tokenizer.")} | keys
    path = model.write(folder / "model.gguf")
    llama_cpp.open(path)
    checkpoint = opened(path, folder)
    ours = load_tokenizer(checkpoint)
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    for text, ids in zip(asked, llama_cpp.tokenize(asked), strict=True):
        assert ours.encode(text) == ids, text
        assert theirs.encode(text) == ids, text
    for text in ("hello world", "x  y ", "größer 你好 🙂"):
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.usefixtures("loads_here")
@pytest.mark.parametrize("pre", [*SPLITTINGS, None])
def test_byte_level_vocabularies(
    llama_cpp: LlamaCpp, tmp_path: Path, byte_level: dict[str, Any], pre: str | None
) -> None:
    keys = byte_level | ({} if pre is None else {"tokenizer.ggml.pre": pre})
    asked = texts()
    if pre == "tekken":
        # llama.cpp takes only ASCII for capitals there; the models' own tokenizers do not.
        asked = [text for text in asked if not any(c.isupper() and c > "z" for c in text)]
    check(llama_cpp, tmp_path, keys, asked)


@pytest.mark.usefixtures("loads_here")
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("model", ["byte_level", "sentencepiece"])
def test_what_is_put_around_a_text(
    request: pytest.FixtureRequest, llama_cpp: LlamaCpp, tmp_path: Path, model: str, adds: bool
) -> None:
    keys = request.getfixturevalue(model) | {"tokenizer.ggml.add_bos_token": adds}
    keys |= {"tokenizer.ggml.add_eos_token": not adds, "tokenizer.ggml.pre": "qwen2"}
    check(llama_cpp, tmp_path, keys, TEXTS[:4])


@pytest.mark.usefixtures("loads_here")
@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece_vocabularies(
    llama_cpp: LlamaCpp, tmp_path: Path, sentencepiece: dict[str, Any], prefix: bool | None
) -> None:
    keys = {} if prefix is None else {"tokenizer.ggml.add_space_prefix": prefix}
    check(llama_cpp, tmp_path, sentencepiece | keys, texts())


def test_templates_come_with_their_names(tmp_path: Path, byte_level: dict[str, Any]) -> None:
    keys = byte_level | {"tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "B"}
    write_tokenizer(GgufFile("model.gguf", keys, {}), tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.chat_template == {"default": "A", "tool_use": "B"}
    message = {"role": "user", "content": "x"}
    template = open_tokenizer(loaded_tokenizer(tmp_path), ()).chat_template
    assert template.render([message], ChatOptions()) == "A"


def damaged(changes: dict[str, Any], message: str) -> Any:
    return pytest.param(
        {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, message, id=message[:20]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        damaged({"pre": "viking"}, r"splits text as 'viking' \(tokenizer\.ggml\.pre\)"),
        damaged({"model": "t5"}, r"of the kind 't5' \(tokenizer\.ggml\.model\)"),
        damaged({"merges": ["h zz"]}, "a merge 'h zz' whose parts"),
        damaged({"merges": None}, r"no list of texts tokenizer\.ggml\.merges"),
        damaged({"tokens": ["a", "a"]}, "the token 'a' twice"),
        damaged({"tokens": ["a", "\udcff"]}, "that is not UTF-8: number 1"),
        damaged({"tokens": [1]}, r"no list of texts tokenizer\.ggml\.tokens"),
        damaged({"token_type": [1]}, "another number of types"),
        damaged({"bos_token_id": 10**6}, "bos_token_id of model.gguf is 1000000"),
        damaged({"eos_token_id": "x"}, "eos_token_id of model.gguf is 'x'"),
        damaged({"add_bos_token": "yes"}, r"add_bos_token of model\.gguf is 'yes'"),
        damaged({"tokens": ["a" * 3000]}, "more than 2048 characters"),
        damaged({"model": "llama", "scores": [float("nan")]}, "no number for each token"),
        damaged({"model": "llama", "scores": None}, "no number for each token"),
    ],
)
def test_a_damaged_vocabulary_is_one_sentence(
    tmp_path: Path, byte_level: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_tokenizer(GgufFile("model.gguf", byte_level | changes, {}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_a_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(GgufFile("model.gguf", {}, {}), tmp_path)
    assert list(tmp_path.iterdir()) == []
