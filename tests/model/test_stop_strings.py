"""Stop strings that have special tokens written out end a row where those come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from qaic_ray.model.detokenizer import StopFinder
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.sampling_params import SamplingParams

END, TURN = 128, 129
NAMES = {END: "<end>", TURN: "<turn>"}


def letters() -> Tokenizer:
    """One token a letter, token ids are letters' codes; and two special tokens behind them."""
    backend = Backend(models.BPE({chr(code): code for code in range(128)}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(NAMES.values()))
    return Tokenizer(backend, settings={}, eos_ids=(END,))


TOKENIZER = letters()


def ids_of(text: str) -> list[int]:
    """`text` in tokens, special ones where they are written."""
    for id_, name in NAMES.items():
        text = text.replace(name, chr(id_))
    return [ord(character) for character in text]


@pytest.mark.parametrize(
    ("text", "params", "kept", "stop", "answer"),
    [
        ("ab<end>cd", {"stop": ("<end>",)}, 3, "<end>", "ab"),
        ("<end>cd", {"stop": ("<end>",)}, 1, "<end>", ""),
        (
            "ab<end>cd",
            {"stop": ("<end>",), "include_stop_str_in_output": True},
            3,
            "<end>",
            "ab<end>",
        ),
        ("ab<turn>c<end>d", {"stop": ("<end>",)}, 5, "<end>", "abc"),
        ("a<turn><turn>b<end><turn>c", {"stop": ("<end><turn>",)}, 6, "<end><turn>", "ab"),
        ("ab\n<end>cd", {"stop": ("b\n<end>c",)}, 5, "b\n<end>c", "a"),
        ("ab\n<turn>cd", {"stop": ("b\n<end>",)}, None, None, "ab\ncd"),
        ("a<turn>b", {"stop": ("ab",)}, 3, "ab", ""),  # no special token stands in the text
        ("a<turn>bab<end>", {"stop": ("<turn>b", "b<end>")}, 3, "<turn>b", "a"),
        ("a<end>b<end>c", {"stop": ("<end>",), "min_tokens": 3}, 4, "<end>", "ab"),
        ("a<end>bc", {"stop": ("<end>",), "min_tokens": 3}, None, None, "abc"),
        ("a<end>", {"stop": ("a", "<end>")}, 1, "a", ""),
        ("ab<end", {"stop": ("<end>",)}, None, None, "ab<end"),
        (
            "a<turn>b<end>",
            {"stop": ("<end>",), "skip_special_tokens": False},
            4,
            "<end>",
            "a<turn>b",
        ),
        ("a<turn>b", {"stop": ("ab",), "skip_special_tokens": False}, None, None, "a<turn>b"),
    ],
)
def test_which_stop_string_wins(
    text: str, params: dict[str, object], kept: int | None, stop: str | None, answer: str
) -> None:
    for at_once in (1, 100):
        reader = StopFinder(TOKENIZER, SamplingParams(**params))  # type: ignore[arg-type]
        ids = ids_of(text)
        outcome = None
        for start in range(0, len(ids), at_once):
            outcome = reader.read(ids[start : start + at_once])
            if outcome is not None:
                break
        assert (outcome, reader.stop, reader.text) == (kept, stop, answer)


PIECES = st.lists(st.sampled_from(["a", "b", "<end>", "<turn>"]), max_size=4).map("".join)


@given(
    text=st.lists(PIECES, max_size=4).map("".join),
    stops=st.lists(PIECES.filter(bool), max_size=3),
    min_tokens=st.integers(0, 4),
)
def test_it_is_as_if_every_beginning_were_searched(
    text: str, stops: list[str], min_tokens: int
) -> None:
    reader = StopFinder(TOKENIZER, SamplingParams(stop=tuple(stops), min_tokens=min_tokens))
    ids = ids_of(text)
    shown = ""
    outcome = None
    for id_ in ids:
        outcome = reader.read([id_])
        assert reader.certain.startswith(shown)
        shown = reader.certain
        if outcome is not None:
            break

    def found(stop: str, length: int) -> bool:
        written = "".join(NAMES.get(id_, chr(id_)) for id_ in ids[:length])
        plain = "".join(chr(id_) for id_ in ids[:length] if id_ not in NAMES)
        is_special = any(name in stop for name in NAMES.values())
        # One that ends before `min_tokens` does not count, so it must end with this very token.
        return (written if is_special else plain).endswith(stop) and (
            is_special or ids[length - 1] not in NAMES
        )

    ends = range(max(1, min_tokens), len(ids) + 1)
    assert outcome == next((n for n in ends if any(found(s, n) for s in stops)), None)
    if outcome is not None:
        assert reader.stop is not None
        kept = ids[: outcome - len(ids_of(reader.stop))]
        if any(name in reader.stop for name in NAMES.values()):
            assert reader.text == "".join(chr(id_) for id_ in kept if id_ not in NAMES)
