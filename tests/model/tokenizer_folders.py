"""Tokenizer folders, one a feature of the library, and texts that are hard on them.

A folder holds a `config.json` and whatever files the feature is about; nothing here is read by
the code under test before.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it can't, it won't, it's done.",
    "Hello there, how are you? I am fine .  Thanks !\n\n\tindented\r\nwindows",
    "naïve café – “quotes” 日本語のテキスト 한국어 🙂👩‍👩‍👧 $12.50 1234567890",
    "def f(x):\n    return x ** 2  # a comment",
] * 8

TEXTS = [
    "hello",
    "Hello there",
    " hello",
    "  two  spaces  ",
    "\n\n\ttabs\r\n",
    "<s>hello</s>",
    "<s>",
    " </s> ",
    "a<|call|>b",
    "a <|call|> b",
    "<|call|><|call|>",
    "<|CALL|>",
    "x<|im_start|>user\nhi<|im_end|>",
    "[INST] hi [/INST]",
    "<image>pic",
    "soft<tool>ware <tool> tool",
    "<unk> and [UNK] and [CLS] [SEP] [MASK] <pad> <0x41>",
    "▁ ▁▁ under▁score",
    "Ġ Ċ ĉ",
    "naïve NAÏVE café cafe\u0301",
    "ﬁne Ⅷ ① ｆｕｌｌ",
    "日本語 한국어 العربية עברית",
    "🙂👩‍👩‍👧🇩🇪\u200d\ufe0f",
    "\u200b\u00a0\u3000\ufeff",
    "\x00\x01\x7f\x85",
    "a\u0300\u0301\u0302",
    "don't can't I've we're it's .,!? ' x '",
    "1234567890 12.50 1,000,000",
    "CamelCaseWord snake_case kebab-case",
    "x" * 70,
    "def f(x):\n    return x\n",
    "https://example.org/?q=a&b=c#d",
    "\\n \\ud83d {{ x }} {% y %}",
    "\ufffd\ufffd",
    "𝒳 𐍈",
    " <mask>",
    "word<mask> word",
]


def _config(folder: Path, **tokenizer_config: Any) -> None:
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | tokenizer_config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _json(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def _bytes(*special: str, merges: bool = True, prefix: bool = False) -> Tokenizer:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420 if merges else 256,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _pieces(kind: str = "BPE") -> Tokenizer:
    """A SentencePiece-like tokenizer in the form of a tokenizer.json."""
    if kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(
            vocab_size=520,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "BPE":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    return tokenizer


def _sentencepiece(folder: Path, name: str, kind: str) -> None:
    import sentencepiece

    corpus = folder.parent / f"{folder.name}.txt"
    corpus.write_text("\n".join(CORPUS).replace("\t", " "), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "sp"),
        vocab_size=420 if kind == "bpe" else 350,
        model_type=kind,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "sp.vocab").unlink()
    (folder / "sp.model").rename(folder / name)


def _template(tokenizer: Tokenizer, single: str, *tokens: str) -> Tokenizer:
    ids = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))


def _added(content: str, *, special: bool = True, **how: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special} | flags | how


ENDS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
FOLDERS: dict[str, Callable[[Path], None]] = {}


def _folder(make: Callable[[Path], None]) -> Callable[[Path], None]:
    FOLDERS[make.__name__.replace("_", "-")] = make
    return make


@_folder
def bytes_without_merges(folder: Path) -> None:
    _config(folder)
    _save(_bytes(merges=False), folder)


@_folder
def bytes_with_merges(folder: Path) -> None:
    _config(folder, **ENDS)
    _save(_bytes("<s>", "</s>"), folder)


@_folder
def no_settings_at_all(folder: Path) -> None:
    _config(folder)
    (folder / "tokenizer_config.json").unlink()
    _save(_bytes("<s>", "</s>"), folder)


@_folder
def bos_by_the_post_processor(folder: Path) -> None:
    _config(folder, **ENDS)
    _save(_template(_bytes("<s>", "</s>"), "<s> $A", "<s>"), folder)


@_folder
def bos_and_eos_by_the_post_processor(folder: Path) -> None:
    _config(folder, **ENDS)
    _save(_template(_bytes("<s>", "</s>"), "<s> $A </s>", "<s>", "</s>"), folder)


@_folder
def bos_by_the_settings(folder: Path) -> None:
    _config(folder, **ENDS, add_bos_token=True)
    _save(_bytes("<s>", "</s>"), folder)


@_folder
def no_bos_by_the_settings(folder: Path) -> None:
    _config(folder, **ENDS, add_bos_token=False, add_eos_token=True)
    _save(_template(_bytes("<s>", "</s>"), "<s> $A", "<s>"), folder)


@_folder
def llama_class_of_bytes(folder: Path) -> None:
    _config(folder, **ENDS, tokenizer_class="LlamaTokenizerFast", add_eos_token=True)
    _save(_template(_bytes("<s>", "</s>"), "<s> $A", "<s>"), folder)


@_folder
def space_before_the_first_word(folder: Path) -> None:
    _config(folder, add_prefix_space=True)
    _save(_bytes("<s>", "</s>", prefix=True), folder)


@_folder
def added_tokens_in_the_settings(folder: Path) -> None:
    tokens = {"440": _added("<|call|>"), "441": _added("<tool>", special=False)}
    _config(folder, added_tokens_decoder=tokens, **ENDS)
    _save(_bytes("<s>", "</s>"), folder)


@_folder
def added_tokens_of_their_own_file(folder: Path) -> None:
    _config(folder, **ENDS)
    _save(_bytes("<s>", "</s>"), folder)
    _json(folder, "added_tokens.json", {"<|call|>": 421, "<|im_end|>": 420, "<tool>": 422})
    _json(folder, "special_tokens_map.json", {"eos_token": "<|im_end|>"})


@_folder
def additional_special_tokens_as_texts(folder: Path) -> None:
    _config(folder, **ENDS)
    _save(_bytes("<s>", "</s>"), folder)
    more = {"additional_special_tokens": ["<|call|>", "<|im_start|>"], "mask_token": "<mask>"}
    _json(folder, "special_tokens_map.json", more)


@_folder
def extra_special_tokens_as_objects(folder: Path) -> None:
    _config(folder)
    _save(_bytes("<s>", "</s>"), folder)
    more: dict[str, Any] = {
        "extra_special_tokens": [_added("<|call|>", lstrip=True), _added("<image>")],
        "mask_token": _added("<mask>", lstrip=True),
        "bos_token": _added("<s>"),
    }
    for token in (*more["extra_special_tokens"], more["mask_token"], more["bos_token"]):
        del token["special"]
    _json(folder, "special_tokens_map.json", more)


@_folder
def additional_special_tokens_in_the_settings(folder: Path) -> None:
    _config(folder, **ENDS, additional_special_tokens=["<|call|>", "<|im_start|>"])
    _save(_bytes("<s>", "</s>"), folder)


@_folder
def extra_special_tokens_as_a_list(folder: Path) -> None:
    _config(folder, **ENDS, extra_special_tokens=["<|call|>", "<|im_end|>"])
    _save(_bytes("<s>", "</s>"), folder)


@_folder
def extra_special_tokens_with_names(folder: Path) -> None:
    _config(folder, **ENDS, extra_special_tokens={"image_token": "<image>"})
    _save(_bytes("<s>", "</s>"), folder)


@_folder
def special_tokens_are_split(folder: Path) -> None:
    _config(folder, **ENDS, split_special_tokens=True)
    _save(_template(_bytes("<s>", "</s>", "<|call|>"), "<s> $A", "<s>"), folder)


@_folder
def normalizers_of_all_kinds(folder: Path) -> None:
    _config(folder, **ENDS)
    tokenizer = _bytes("<s>", "</s>")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.add_tokens([AddedToken("<|CALL|>", normalized=True)])
    _save(tokenizer, folder)


@_folder
def spaces_of_words_are_cleaned_up(folder: Path) -> None:
    _config(folder, clean_up_tokenization_spaces=True, unk_token="[UNK]")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    _save(tokenizer, folder)


@_folder
def bytes_are_not_cleaned_up(folder: Path) -> None:
    _config(folder, **ENDS, clean_up_tokenization_spaces=True)
    _save(_bytes("<s>", "</s>"), folder)


@_folder
def whole_words_only(folder: Path) -> None:
    _config(folder, unk_token="<unk>")
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    _save(tokenizer, folder)


@_folder
def unigram_pieces(folder: Path) -> None:
    _config(folder, **ENDS, unk_token="<unk>", clean_up_tokenization_spaces=True)
    _save(_pieces("Unigram"), folder)


@_folder
def pieces_with_byte_fallback(folder: Path) -> None:
    _config(folder, **ENDS, unk_token="<unk>")
    _save(_template(_pieces(), "<s> $A", "<s>"), folder)


@_folder
def llama_class_of_pieces(folder: Path) -> None:
    _config(folder, **ENDS, unk_token="<unk>", tokenizer_class="LlamaTokenizer", legacy=False)
    _save(_template(_pieces(), "<s> $A", "<s>"), folder)


@_folder
def truncation_and_padding_are_stored(folder: Path) -> None:
    _config(folder, **ENDS, pad_token="</s>")
    tokenizer = _bytes("<s>", "</s>")
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=16, pad_id=1, pad_token="</s>")
    _save(tokenizer, folder)


@_folder
def added_tokens_of_every_flag(folder: Path) -> None:
    _config(folder, **ENDS)
    tokenizer = _bytes("<s>", "</s>")
    tokenizer.add_tokens(
        [
            AddedToken("<|call|>", lstrip=True, rstrip=True),
            AddedToken("<tool>", single_word=True),
            AddedToken("tool", single_word=True),
            AddedToken("naïve", normalized=True),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    _save(tokenizer, folder)


@_folder
def roberta_post_processor(folder: Path) -> None:
    _config(folder, **ENDS)
    tokenizer = _bytes("<s>", "</s>")
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 1), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    _save(tokenizer, folder)


@_folder
def split_as_llama_3_does(folder: Path) -> None:
    _config(folder, bos_token="<s>")
    tokenizer = _bytes("<s>", "</s>")
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    _save(tokenizer, folder)


@_folder
def gpt2_files(folder: Path) -> None:
    _config(folder, tokenizer_class="GPT2Tokenizer", bos_token="<s>", unk_token="<s>")
    _bytes("<s>").model.save(str(folder))


@_folder
def qwen2_files(folder: Path) -> None:
    tokens = {"440": _added("<|im_start|>"), "441": _added("<|im_end|>")}
    _config(
        folder,
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|im_end|>",
        pad_token="<s>",
        unk_token=None,
        added_tokens_decoder=tokens,
    )
    _bytes("<s>").model.save(str(folder))


@_folder
def sentencepiece_file(folder: Path) -> None:
    _config(folder, **ENDS, unk_token="<unk>", tokenizer_class="LlamaTokenizer", legacy=True)
    _sentencepiece(folder, "tokenizer.model", "bpe")


@_folder
def sentencepiece_file_not_legacy(folder: Path) -> None:
    _config(
        folder,
        **ENDS,
        unk_token="<unk>",
        tokenizer_class="LlamaTokenizer",
        legacy=False,
        add_bos_token=True,
        add_eos_token=True,
    )
    _sentencepiece(folder, "tokenizer.model", "bpe")


@_folder
def sentencepiece_file_with_added_tokens(folder: Path) -> None:
    _config(folder, bos_token="<s>", eos_token="<|im_end|>", tokenizer_class="LlamaTokenizer")
    _sentencepiece(folder, "tokenizer.model", "bpe")
    _json(folder, "added_tokens.json", {"<|im_start|>": 420, "<|im_end|>": 421})


@_folder
def sentencepiece_file_of_unigrams(folder: Path) -> None:
    _config(folder, tokenizer_class="T5Tokenizer", extra_ids=0, clean_up_tokenization_spaces=True)
    _sentencepiece(folder, "spiece.model", "unigram")


@_folder
def tiktoken_file(folder: Path) -> None:
    _config(folder, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    ranks = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello", b" t"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (folder / "tiktoken.model").write_text("\n".join(lines))
