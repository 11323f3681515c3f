"""From a prompt that asks for a form, or for its own logprobs, to its row: no Ray, no threads."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from byte_tokens import byte_tokenizer
from formula_program import FormulaProgram
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from qaic_ray.contract import Specializations
from qaic_ray.engine.engine import Engine
from qaic_ray.errors import RowError
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.worker.feeds import StreamedSequence
from qaic_ray.worker.text import Answerer

EOS, VOCAB = 256, 300
TOKENIZER = Tokenizer(
    byte_tokenizer("<eos>", "<two>"), {"special_tokens_map": {"eos_token": "<eos>"}}, ()
)
NAME = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}},
    "required": ["name"],
    "additionalProperties": False,
}


def answerer(
    *, tokenizer: Tokenizer = TOKENIZER, every_token: bool = True, **run: Any
) -> tuple[Answerer, Engine]:
    shapes = Specializations.build(batch_size=2, prompt_len=4, ctx_len=64, continuous=True)
    engine = Engine(FormulaProgram(shapes, vocab=VOCAB, every_token=every_token))
    made = Answerer(tokenizer, Generation(**run), engine=engine, vocab_size=VOCAB)
    return made, engine


def rows_of(*asked: dict[str, Any], **options: Any) -> list[Row]:
    """The rows of prompts that ask for this, side by side."""
    made, engine = answerer(**options)
    answers = [
        made.begin(Prompt(index, "Say it", sampling=SamplingParams().updated(fields)))
        for index, fields in enumerate(asked)
    ]
    owner = {sequence: answer for answer in answers for sequence in answer.sequences}
    for answer in answers:
        for sequence, reader in zip(answer.sequences, answer.readers, strict=True):
            engine.add(sequence, reader)
    while engine.busy:
        for done in engine.step():
            owner[done.sequence].finished.append(done)
    return [made.row(answer, worker="card 0", attempts=1) for answer in answers]


def refused(fields: dict[str, Any], **options: Any) -> str:
    with pytest.raises(RowError) as caught:
        answerer(**options)[0].begin(Prompt(0, "Say it", sampling=SamplingParams().updated(fields)))
    return str(caught.value)


def form(**form: Any) -> dict[str, Any]:
    return {"structured_outputs": form, "max_tokens": 50}


def test_a_row_has_the_text_of_its_form_and_ends_by_itself() -> None:
    choice, schema, pattern, free = rows_of(
        form(choice=["left", "right"]),
        form(json=NAME, disable_any_whitespace=True),
        {**form(regex="[a-z]{4}-[0-9]{2}"), "temperature": 2.0, "seed": 5},
        {"max_tokens": 6},
    )
    assert choice.text in ("left", "right")
    assert list(json.loads(schema.text)) == ["name"]
    assert re.fullmatch("[a-z]{4}-[0-9]{2}", pattern.text)
    assert len(pattern.token_ids) == 7  # no token for the end
    for row in (choice, schema, pattern):
        assert (row.finish_reason, row.stop_reason) == (FinishReason.STOP, None)
    assert free.token_ids == rows_of({"max_tokens": 6})[0].token_ids


def test_each_of_n_answers_has_a_matcher_of_its_own() -> None:
    (row,) = rows_of({**form(regex="[a-f]{8}"), "n": 6, "temperature": 3.0, "seed": 1})
    texts = [choice.text for choice in row.choices]
    assert all(re.fullmatch("[a-f]{8}", text) for text in texts)
    assert len(set(texts)) > 3


def test_eos_and_stop_tokens_end_a_whole_answer_and_are_not_its_text() -> None:
    fields = form(regex="[a-b]{3,}")
    # Biases make every row end as soon as it may.
    ended, stopped = rows_of(
        {**fields, "logit_bias": {str(EOS): 100}},
        {**fields, "logit_bias": {"257": 100}, "stop_token_ids": [257]},
    )
    assert (len(ended.text), ended.token_ids[-1], ended.stop_reason) == (3, EOS, None)
    assert (len(stopped.text), stopped.token_ids[-1], stopped.stop_reason) == (3, 257, 257)
    (ignored,) = rows_of({**fields, "logit_bias": {str(EOS): 100}, "ignore_eos": True})
    assert (len(ignored.text), ignored.finish_reason) == (50, FinishReason.LENGTH)


def test_a_stop_string_ends_an_answer_amid_its_form() -> None:
    (row,) = rows_of({**form(choice=["one, two"]), "stop": [","]})
    assert (row.text, row.finish_reason, row.stop_reason) == ("one", FinishReason.STOP, ",")


def test_a_run_may_say_the_form_of_all_its_rows() -> None:
    made, _ = answerer(sampling=SamplingParams().updated({"structured_outputs": {"regex": "ab"}}))
    answer = made.begin(Prompt(0, "x"))
    guide = answer.sequences[0].guide
    assert guide is not None
    assert [TOKENIZER.decode([token]) for token in guide.forced()] == ["a", "b"]


def test_a_streamed_row_shows_all_of_its_text() -> None:
    made, engine = answerer()
    sampling = SamplingParams().updated(form(choice=["abc"]))
    answer = made.begin(Prompt(0, "x", sampling=sampling, stream=True))
    (streamed,) = answer.streamed
    assert isinstance(streamed, StreamedSequence)
    engine.add(answer.sequences[0])
    texts = []
    while engine.busy:
        engine.step()
        chunk = streamed.read()
        texts += [chunk.text] if chunk is not None else []
    assert "".join(texts) == "abc"


def test_a_bad_word_comes_neither_at_the_beginning_nor_behind_a_blank() -> None:
    made, _ = answerer()
    sampling = SamplingParams(bad_words=("no", " no", "é"))
    (sequence,) = made.begin(Prompt(0, "x", sampling=sampling)).sequences
    assert [TOKENIZER.decode(list(word)) for word in sequence.bad_ids] == ["no", " no", "é", " é"]
    (row,) = rows_of({"max_tokens": 30, "bad_words": [TOKENIZER.decode([i]) for i in range(97)]})
    assert all(token >= 97 for token in row.token_ids)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"allowed_token_ids": [3, 300]}, "allowed_token_ids has the token 300, and the model's"),
        ({"logit_bias": {"300": 1}}, "logit_bias has the token 300, and the model's last one"),
    ],
)
def test_tokens_that_the_model_has_not_are_refused(fields: dict[str, Any], sentence: str) -> None:
    assert refused(fields).startswith(sentence)


def test_a_tokenizer_that_no_grammar_can_be_made_for_is_said() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.decoder = decoders.Fuse()
    words = Tokenizer(backend, {}, (1,))
    assert "llguidance cannot read its tokenizer" in refused(form(regex="a"), tokenizer=words)


# -- logprobs of prompts


def test_a_row_has_the_logprobs_of_its_prompt_once_whatever_n() -> None:
    asked = {"prompt_logprobs": 2, "max_tokens": 2}
    one, several, none = rows_of(
        asked, {**asked, "n": 3, "temperature": 1.0}, {"max_tokens": 2, "logprobs": 1}
    )
    assert one.prompt_logprobs is not None
    assert one.prompt_logprobs[0] is None
    prompt = TOKENIZER.encode("Say it")
    assert [token and token.token_id for token in one.prompt_logprobs] == [None, *prompt[1:]]
    assert several.prompt_logprobs == one.prompt_logprobs
    assert none.prompt_logprobs is None
    document = one.to_json()
    assert document["prompt_logprobs"][0] is None
    assert [len(token["top"]) for token in document["prompt_logprobs"][1:]] == [2] * 5
    assert "prompt_logprobs" not in none.to_json()


def test_rows_say_what_their_slot_held_already() -> None:
    made, engine = answerer()
    found = []
    for fields in ({}, {}, {"prompt_logprobs": 0}):
        sampling = SamplingParams(max_tokens=1).updated(fields)
        answer = made.begin(Prompt(0, "A long prompt", sampling=sampling))
        engine.add(answer.sequences[0])
        while engine.busy:
            answer.finished += engine.step()
        found.append(made.row(answer, worker="", attempts=1))
    assert [row.reused_tokens for row in found] == [0, 12, 0]
    assert ["reused_tokens" in row.to_json() for row in found] == [False, True, False]


def test_logprobs_that_the_qpc_cannot_give_are_refused_with_what_to_do() -> None:
    said = refused({"prompt_logprobs": 1}, every_token=False)
    assert "`qaic-ray export MODEL --logits all` and `qaic-ray compile`" in said
