"""Which replica a prompt goes to: the longest beginning, then the least load, against a model."""

from __future__ import annotations

import pickle

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qaic_ray.dispatch.policy import DEFAULT_POLICY
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.serve.ray_serve.question import Inbox, Question
from qaic_ray.serve.ray_serve.replica_choice import Candidate, ReplicaChoice

BLOCK = DEFAULT_POLICY.block_tokens
A, B = Candidate("a", 2), Candidate("b", 2)


def prompt(index: int, *ids: int) -> Prompt:
    """A prompt of whole blocks, each of one token."""
    return Prompt(index, "", token_ids=tuple(i for i in ids for _ in range(BLOCK)))


def answered(asked: Prompt, *ids: int) -> Row:
    made = tuple(i for i in ids for _ in range(BLOCK))
    return Row(asked.index, "", "", FinishReason.LENGTH, token_ids=(*made, 0))


def test_a_prompt_goes_where_its_longest_beginning_is() -> None:
    choice = ReplicaChoice()
    first, other = prompt(0, 1, 2, 3), prompt(1, 7)
    for name, asked in (("b", first), ("a", other)):
        choice.order(asked, [A, B])
        choice.begin(name, asked)
        choice.end(asked, answered(asked, 9))
    assert choice.order(prompt(2, 1, 2, 5), [A, B])[0] == "b"
    assert choice.order(prompt(3, 7, 9, 9), [A, B])[0] == "a"


def test_an_answer_is_part_of_what_a_slot_holds() -> None:
    choice = ReplicaChoice()
    for name, made in (("a", 8), ("b", 9)):
        asked = prompt(ord(name), 1)
        choice.order(asked, [A, B])
        choice.begin(name, asked)
        choice.end(asked, answered(asked, made))
    assert choice.order(prompt(1, 1, 9, 4), [A, B])[0] == "b"
    assert choice.order(prompt(2, 1, 8, 4), [A, B])[0] == "a"


def test_a_replica_without_a_free_slot_comes_last_whatever_it_holds() -> None:
    choice = ReplicaChoice()
    asked = prompt(0, 1, 2)
    choice.order(asked, [A, B])
    choice.begin("a", asked)
    choice.end(asked, answered(asked, 3))
    full = Candidate("a", 2, load=2)
    assert choice.order(prompt(1, 1, 2), [A, B]) == ["a", "b"]
    assert choice.order(prompt(1, 1, 2), [full, B]) == ["b", "a"]


def test_prompts_that_came_at_once_are_shared_out_before_any_replica_has_one() -> None:
    choice = ReplicaChoice()
    meant = [choice.order(prompt(index, index), [A, B])[0] for index in range(4)]
    assert sorted(meant) == ["a", "a", "b", "b"]


def test_what_others_gave_a_replica_counts() -> None:
    choice = ReplicaChoice()
    assert choice.order(prompt(0, 1), [Candidate("a", 8, load=3), Candidate("b", 8)])[0] == "b"
    assert choice.order(prompt(0, 1), [Candidate("a", 8, load=3), Candidate("b", 2, load=1)]) == [
        "a",
        "b",
    ]


def test_a_replica_holds_what_it_answered_though_nobody_said_that_it_took_it() -> None:
    choice = ReplicaChoice()
    asked = prompt(0, 1, 2)
    name = choice.order(asked, [A, B])[0]
    choice.end(asked, answered(asked, 3))
    other = prompt(1, 9)
    full = choice.order(other, [A, B])
    assert choice.order(prompt(2, 1, 2, 3, 4), [A, B])[0] == name
    assert choice.load(full[0]) + choice.load(full[1]) == 2


def test_a_question_leaves_its_choice_in_the_process_that_asks() -> None:
    asked = Question(prompt(0, 1), 3, Inbox("127.0.0.1", 1, "secret"), ReplicaChoice())
    read = pickle.loads(pickle.dumps(asked))
    assert read == asked
    assert read.choice is None
    assert "secret" not in repr(asked)


class Choices(RuleBasedStateMachine):
    """Prompts given, taken and ended in any order, replicas that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = ReplicaChoice()
        self.there = ["a"]
        self.meant: dict[int, str] = {}
        self.running: dict[int, str] = {}
        self.prompts: dict[int, Prompt] = {}
        self.ran: set[int] = set()  # first tokens of what some slot may hold

    @rule(ids=st.lists(st.integers(0, 2), max_size=3))
    def ask(self, ids: list[int]) -> None:
        asked = prompt(len(self.prompts), *ids)
        self.prompts[asked.index] = asked
        ordered = self.choice.order(asked, [Candidate(name, 2) for name in self.there])
        assert sorted(ordered) == sorted(self.there)
        free = [name for name in self.there if self.load(name) < 2]
        if free:
            assert ordered[0] in free
            if not ids or ids[0] not in self.ran:
                assert self.load(ordered[0]) == min(map(self.load, free))
        self.meant[asked.index] = ordered[0]

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        if self.meant:
            index = data.draw(st.sampled_from(sorted(self.meant)))
            self.running[index] = data.draw(st.sampled_from(self.there))
            del self.meant[index]
            self.ran.update((self.prompts[index].token_ids or ())[:1])
            self.choice.begin(self.running[index], self.prompts[index])
            if self.running[index] not in self.choice.names:
                del self.running[index]  # nobody asked since it came

    @rule(data=st.data(), is_ok=st.booleans())
    def end(self, data: st.DataObject, is_ok: bool) -> None:
        known = sorted({*self.meant, *self.running})
        if known:
            index = data.draw(st.sampled_from(known))
            self.meant.pop(index, None)
            self.running.pop(index, None)
            asked = self.prompts[index]
            self.ran.add(1)  # the answer to a prompt of no tokens
            self.choice.end(asked, answered(asked, 1) if is_ok else None)
            self.choice.end(asked)  # a second end is of nothing

    @rule(names=st.sets(st.sampled_from("abc"), min_size=1))
    def come_and_go(self, names: set[str]) -> None:
        self.there = sorted(names)
        self.choice.order(prompt(10**6), [Candidate(name, 2) for name in self.there])
        self.choice.end(prompt(10**6))
        self.running = {i: name for i, name in self.running.items() if name in names}

    def load(self, name: str) -> int:
        return sum(one == name for one in (*self.meant.values(), *self.running.values()))

    @invariant()
    def loads_are_those_of_what_is_open(self) -> None:
        for name in "abc":
            assert self.choice.load(name) == self.load(name)


TestChoices = Choices.TestCase
