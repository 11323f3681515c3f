"""Text while it comes: equal to the tokenizer's own in the end, and never taken back before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from qaic_ray.model.detokenizer import IncrementalText, StopFinder
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.sampling_params import SamplingParams

CORPUS = [
    "the naïve cat – 日本語 🙂🐈 and  the  end\n",
    "une très grande maison, 東京の猫 \ufffd",
] * 4
SPECIAL = "</s>"
ADDED = "<added é 日>"  # not special: it has a text, with characters no byte table knows


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def metaspace() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", show_progress=False)
    trainer.special_tokens = [AddedToken("<unk>", special=True)]
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback(*decoder: object) -> Backend:
    words = ["▁", "▁the", "the", "▁▁", "naïve", "▁猫", "é", ".", "\ufffd", "<0x", "a▁b▁"]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(list(decoder))
    return backend


REPLACE, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
STRIP = decoders.Strip(" ", 1, 0)
BYTES_AS_PIECES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BACKENDS = {
    "byte-level": byte_level,
    "metaspace": metaspace,
    "llama": lambda: byte_fallback(REPLACE, BYTES, FUSE, STRIP),
    "no strip": lambda: byte_fallback(REPLACE, BYTES, FUSE),
    "gguf": lambda: byte_fallback(BYTES, FUSE, REPLACE, decoders.Strip(" ", 2, 0)),
    "unknown": lambda: byte_fallback(BYTES, FUSE, STRIP, REPLACE),
}


@pytest.fixture(scope="module", params=BACKENDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend = BACKENDS[request.param]()
    backend.add_special_tokens([SPECIAL])
    backend.add_tokens([ADDED])
    return Tokenizer(backend, settings={}, eos_ids=())


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of the text's bytes, where the vocabulary has them."""
    pieces = [f"<0x{byte:02X}>" for byte in text.encode()]
    if tokenizer.decoder_steps[0]["type"] == "ByteLevel":
        pieces = [*BYTES_AS_PIECES.pre_tokenize_str(text)[0][0]]
    vocabulary = {tokenizer.piece(id_): id_ for id_ in range(tokenizer.vocab_size)}
    return [vocabulary[piece] for piece in pieces if piece in vocabulary]


@pytest.fixture(scope="module")
def answers(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any tokens, ids that no vocabulary has, and characters byte by byte."""
    any_id = st.integers(0, tokenizer.vocab_size + 1).map(lambda id_: [id_])
    characters = st.sampled_from([spelled(tokenizer, text) for text in "🙂日é\ufffd"])
    runs = st.lists(any_id | characters, max_size=14)
    return runs.map(lambda runs: [id_ for run in runs for id_ in run])


def parts(ids: Sequence[int], sizes: Sequence[int]) -> Iterator[Sequence[int]]:
    """`ids` cut into parts of these sizes, over and over."""
    rest = ids
    for size in cycle(sizes):
        if not rest:
            return
        yield rest[:size]
        rest = rest[size:]


SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(data=st.data(), sizes=SIZES, skips=st.booleans())
def test_pushes_are_the_text_and_are_never_taken_back(
    tokenizer: Tokenizer,
    answers: st.SearchStrategy[list[int]],
    data: st.DataObject,
    *,
    sizes: list[int],
    skips: bool,
) -> None:
    ids = data.draw(answers)
    text = IncrementalText(tokenizer, skips_special=skips)
    given_so_far = ""
    taken: list[int] = []
    for part in parts(ids, sizes):
        given_so_far += text.push(part)
        taken.extend(part)
        now = tokenizer.decode(taken, skips_special=skips)
        assert now.startswith(given_so_far)
        if not now.endswith("\ufffd"):
            assert now == given_so_far + text.loose
    given_so_far += text.finish()
    assert given_so_far == text.text == tokenizer.decode(ids, skips_special=skips)
    assert text.finish() == ""


def test_whole_characters_are_given_as_soon_as_they_are_whole() -> None:
    tokenizer = Tokenizer(byte_level(), settings={}, eos_ids=())
    text = IncrementalText(tokenizer)
    ids = [id_ for character in "é🙂日" for id_ in spelled(tokenizer, character)]
    assert [text.push([id_]) for id_ in ids] == ["", "é", "", "", "", "🙂", "", "", "日"]


# -- stop strings


@given(data=st.data(), sizes=SIZES, include=st.booleans(), skips=st.booleans())
def test_a_stop_string_is_found_at_once_and_nothing_behind_it_is_kept(
    tokenizer: Tokenizer,
    answers: st.SearchStrategy[list[int]],
    data: st.DataObject,
    *,
    sizes: list[int],
    include: bool,
    skips: bool,
) -> None:
    ids = data.draw(answers)
    ends = range(len(ids) + 1)
    texts = [tokenizer.decode(ids[:count], skips_special=skips) for count in ends]
    places = st.integers(0, len(texts[-1]))
    cuts = st.tuples(places, st.integers(1, 5)).map(lambda cut: texts[-1][cut[0] : sum(cut)])
    stops = data.draw(st.lists(cuts | st.sampled_from(["t", "the", "🙂", " ", "日é"]), max_size=3))
    stops = [stop for stop in stops if stop and "\ufffd" not in stop]
    params = SamplingParams(
        stop=tuple(stops), include_stop_str_in_output=include, skip_special_tokens=skips
    )
    reader = StopFinder(tokenizer, params)
    shown = ""
    kept = None
    for part in parts(ids, sizes):
        kept = reader.read(part)
        assert reader.certain.startswith(shown)
        shown = reader.certain
        if kept is not None:
            break
    # The truth: decode every beginning of the answer, and look in each.
    holding = [count for count, text in enumerate(texts) if any(stop in text for stop in stops)]
    assert kept == min(holding, default=None)
    if kept is None:
        assert reader.stop is None
        if not texts[-1].endswith("\ufffd"):
            assert reader.text == texts[-1]
    else:
        text = texts[kept]
        end, start = min((text.find(s) + len(s), text.find(s)) for s in stops if s in text)
        assert reader.stop == text[start:end]
        assert reader.text == reader.certain == text[: end if include else start]
        assert reader.read(ids[:3]) == kept
    assert reader.text.startswith(shown)


def letters() -> Tokenizer:
    """One token a letter: token ids are letters' codes."""
    backend = Backend(models.BPE({chr(code): code for code in range(128)}, []))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, settings={}, eos_ids=())


@pytest.mark.parametrize(
    ("text", "params", "kept", "stop", "answer"),
    [
        ("one. two.", {"stop": ("xx", ". ")}, 5, ". ", "one"),
        ("one. two.", {"stop": (". ",), "include_stop_str_in_output": True}, 5, ". ", "one. "),
        ("abcabd", {"stop": ("abd",)}, 6, "abd", "abc"),
        ("aab", {"stop": ("ab",)}, 3, "ab", "a"),
        ("abcd", {"stop": ("d", "bcd", "abcde")}, 4, "bcd", "a"),
        ("abcd", {"stop": ("abcd", "bc")}, 3, "bc", "a"),
        ("abcd", {"stop": ("abcde",)}, None, None, "abcd"),
        ("ababab", {"stop": ("ab",), "min_tokens": 2}, 2, "ab", ""),
        ("ababab", {"stop": ("ab",), "min_tokens": 3}, 4, "ab", "ab"),
        ("aaaa", {"stop": ("aa",), "min_tokens": 3}, 3, "aa", "a"),
        ("xaxbxc", {"stop": ("xa", "xc"), "min_tokens": 4}, 6, "xc", "xaxb"),
    ],
)
def test_which_stop_string_wins(
    text: str, params: dict[str, object], kept: int | None, stop: str | None, answer: str
) -> None:
    for at_once in (1, len(text)):
        reader = StopFinder(letters(), SamplingParams(**params))  # type: ignore[arg-type]
        outcome = None
        for part in parts([*text.encode()], [at_once]):
            outcome = reader.read(part)
            if outcome is not None:
                break
        assert (outcome, reader.stop, reader.text) == (kept, stop, answer)


def test_what_may_begin_a_stop_string_is_not_certain() -> None:
    reader = StopFinder(letters(), SamplingParams(stop=("END", "\n\n")))
    shown = []
    for character in b"a\nb E EN END":
        reader.read([character])
        shown.append(reader.certain)
    assert shown == ["a", "a", "a\nb", "a\nb ", "a\nb ", "a\nb E ", "a\nb E ", "a\nb E ",
                     "a\nb E EN ", "a\nb E EN ", "a\nb E EN ", "a\nb E EN "]  # fmt: skip
