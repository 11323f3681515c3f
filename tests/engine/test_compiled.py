"""The compiled kernels against numpy: the same tokens, bit for bit, and less work."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from awaited import joined
from hypothesis import example, given
from hypothesis import strategies as st

from qaic_ray.engine.categorical import NUMBERS, CategoricalSampler, Rules
from qaic_ray.engine.compiled import chooser, kernels, tail
from qaic_ray.engine.compiled import loader as loader_module
from qaic_ray.engine.compiled.loader import KernelLoader
from qaic_ray.engine.past import Pasts
from qaic_ray.engine.sampler import Selector
from qaic_ray.engine.steps import Sequence
from qaic_ray.engine.unsettled import Unsettled
from qaic_ray.sampling_params import SamplingParams

Array = npt.NDArray[Any]

VOCABS = (8192, 8205, 12_301)
"""The smallest that the kernels take; with a last block that is not full; of no power of two."""
KINDS = ("language", "peaked", "flat", "tied", "equal", "two", "huge", "zeros")

NUMPY = KernelLoader(sys.maxsize)
COMPILED = KernelLoader()


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    assert COMPILED.wait() is not None


def logits_of(kind: str, vocab: int, seed: int) -> Array:
    """One row."""
    rng = np.random.default_rng(seed)
    row = rng.normal(0, 1, vocab)
    if kind == "language":  # falls with the logarithm of the rank
        row = rng.permutation(-1.6 * np.log1p(np.arange(vocab))) + rng.normal(0, 0.1, vocab)
    elif kind == "peaked":
        row = row * 3 - 18
        few = max(3, vocab // 100)
        row[rng.permutation(vocab)[:few]] = -rng.exponential(4, few)
    elif kind == "tied":
        row = np.round(row)
    elif kind == "equal":
        row = np.zeros(vocab)
    elif kind == "two":
        row = np.full(vocab, -np.inf)
        row[rng.permutation(vocab)[:2]] = 1.0, 1.5
    elif kind == "huge":
        row *= 1e37
    elif kind == "zeros":  # the largest are of both signs, and so are the numbers beside them
        row = rng.normal(-5, 1, vocab)
        row[rng.permutation(vocab)[:60]] = rng.choice([0.0, -0.0, -1e-45], 60)
    return row.astype(np.float32)


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-4, 0.3, 0.7, 1.0, 1.7, 50.0]),
        "top_k": st.sampled_from([0, 1, 3, 50, 255, 256, 257, 3000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 1e-6, 1 - 1e-9]),
        "min_p": st.sampled_from([0.0, 0.05, 1e-9, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.4]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.3, -0.4]),
        "min_tokens": st.sampled_from([0, 2]),
        "logprobs": st.sampled_from([None, 2]),
        # How many tokens are allowed, and how many have their logits moved.
        "allowed_token_ids": st.sampled_from([1, 5, 300, 6000]),
        "logit_bias": st.sampled_from([1, 40]),
    },
)
ROW = st.tuples(
    PARAMS,
    st.sampled_from(KINDS),
    st.sampled_from([None, None, None, np.nan, -np.nan, np.inf, -np.inf]),
    st.integers(0, 2**32),
)


def sequence(key: int, fields: dict[str, Any], vocab: int, seed: int) -> Sequence:
    """A row that has seen some tokens, likely and unlikely ones."""
    rng = np.random.default_rng(seed)
    prompt = tuple(rng.integers(0, vocab, rng.choice([1, 40, 200])).tolist())
    stops = frozenset(rng.integers(0, vocab + 100, 3).tolist())
    fields = dict(fields)
    if "allowed_token_ids" in fields:
        # One more than can be stop tokens, so that there is one to choose.
        num_allowed = fields["allowed_token_ids"] + 3
        fields["allowed_token_ids"] = tuple(rng.permutation(vocab)[:num_allowed].tolist())
    if "logit_bias" in fields:
        ids = rng.permutation(vocab)[: fields["logit_bias"]].tolist()
        biases = rng.uniform(-100, 100, len(ids)).tolist()
        fields["logit_bias"] = tuple(zip(ids, biases, strict=True))
    return Sequence(key, prompt, 100, stops, SamplingParams(**fields), seed=seed % 2**31)


def poisoned(row: Array, value: float | None, seed: int) -> Array:
    if value is not None:
        row = row.copy()
        row[seed % row.size] = value
    return row


@given(vocab=st.sampled_from(VOCABS), rows=st.lists(ROW, min_size=1, max_size=5))
@example(vocab=8205, rows=[({"temperature": 1.0}, "equal", None, 0)])
@example(vocab=8205, rows=[({"temperature": 1.0, "top_k": 9}, "zeros", None, 0)] * 3)
@example(vocab=8192, rows=[({"min_tokens": 2}, "two", None, 3), ({}, "zeros", np.nan, 4)])
def test_numpy_and_kernels_choose_the_same_tokens(
    vocab: int, rows: list[tuple[dict[str, Any], str, float | None, int]]
) -> None:
    reference = Selector(len(rows), loader=NUMPY)
    compiled = Selector(len(rows), loader=COMPILED)
    for selector in (reference, compiled):
        for slot, (fields, _, _, seed) in enumerate(rows):
            selector.enter(slot, sequence(slot, fields, vocab, seed))
    slots = list(range(len(rows)))
    for step in range(5):
        logits = np.stack([
            # The best tokens come again, so that penalties meet them.
            poisoned(logits_of(kind, vocab, seed + step // 2), value if step > 2 else None, seed)
            for _, kind, value, seed in rows
        ])  # fmt: skip
        before = logits.copy()
        logits.flags.writeable = False
        wanted, found = reference.choose(logits, slots), compiled.choose(logits, slots)
        assert found.tokens == wanted.tokens
        assert repr(found.logprobs) == repr(wanted.logprobs)  # NaN is not NaN
        np.testing.assert_array_equal(logits, before)
        # Rows that are called well are so.
        well = [slot for slot in slots if slot not in found.odd]
        assert np.isfinite(logits[well, np.array(found.tokens)[well]]).all()
    assert compiled._group is not None
    tops = [fields.get("top_k", 0) for fields, _, _, _ in rows if fields.get("temperature")]
    is_alone = all({"allowed_token_ids", "logit_bias"} & fields.keys() for fields, *_ in rows)
    assert (compiled._group.compiled is None) == (is_alone or max(tops, default=0) > 256)


EDGES = st.sampled_from([0.0, 2.0**-53, 0.5, 0.9, 0.999999, 1 - 2.0**-53])


@given(
    vocab=st.sampled_from(VOCABS),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([0.2, 0.6, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.99, 0.9]),
    uniforms=st.lists(EDGES | st.floats(0, 1, exclude_max=True), min_size=NUMBERS, max_size=40),
    seed=st.integers(0, 999),
)
def test_places_at_every_edge_of_the_line_hold_the_same_token(
    vocab: int, kind: str, temperature: float, top_p: float, uniforms: list[float], seed: int
) -> None:
    num_rows = len(uniforms) // NUMBERS
    table = np.array(uniforms[: num_rows * NUMBERS]).reshape(num_rows, 1, NUMBERS)
    logits = np.stack([logits_of(kind, vocab, seed + row) for row in range(num_rows)])
    params = [SamplingParams(temperature=temperature, top_p=top_p)] * num_rows
    compiled = chooser.Compiled(
        params,
        range(num_rows),
        vocab,
        uniforms=table,
        numbers=np.zeros(num_rows, np.int64),
    )
    rules = Rules([(temperature, 0, top_p, 0.0)] * num_rows, vocab)
    wanted = CategoricalSampler().draw(logits, rules, table[:, 0])
    for _ in range(2):  # its buffers are used again
        tokens, odd = compiled.choose(logits, Pasts(num_rows))
        decided = [row for row in range(num_rows) if row not in odd]
        assert tokens[decided].tolist() == wanted[decided].tolist()


@given(rows=st.lists(ROW, min_size=2, max_size=5), data=st.data())
def test_a_rows_tokens_depend_on_no_batch_slot_or_order(
    rows: list[tuple[dict[str, Any], str, float | None, int]], data: st.DataObject
) -> None:
    vocab, steps = 8205, 3
    logits = [
        [logits_of(kind, vocab, seed + step) for step in range(steps)] for _, kind, _, seed in rows
    ]
    alone = []
    for key, (fields, _, _, seed) in enumerate(rows):
        selector = Selector(1, loader=COMPILED)
        selector.enter(0, sequence(key, fields, vocab, seed))
        alone.append([selector.choose(row[None], [0]).tokens[0] for row in logits[key]])
    slots = data.draw(st.permutations(range(len(rows) + 1)))[: len(rows)]
    selector = Selector(len(rows) + 1, loader=COMPILED)
    for key, (fields, _, _, seed) in enumerate(rows):
        selector.enter(slots[key], sequence(key, fields, vocab, seed))
    together: list[list[int]] = [[] for _ in rows]
    while left := [key for key, tokens in enumerate(together) if len(tokens) < steps]:
        some = data.draw(st.permutations(left))[: data.draw(st.integers(1, len(left)))]
        batch = np.stack([logits[key][len(together[key])] for key in some])
        chosen = selector.choose(batch, [slots[key] for key in some]).tokens
        for key, token in zip(some, chosen, strict=True):
            together[key].append(token)
    assert together == alone


def test_a_prompts_token_beyond_the_vocabulary_is_for_numpy_which_says_so() -> None:
    selector = Selector(1, loader=COMPILED)
    selector.enter(0, Sequence(0, (9000,), 9, params=SamplingParams(presence_penalty=1.0)))
    with pytest.raises(IndexError):
        selector.choose(logits_of("flat", 8192, 0)[None], [0])


def test_selectors_in_several_threads_choose_what_each_chooses_alone() -> None:
    vocab, steps = 12_301, 30
    fields = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2}
    logits = np.stack([logits_of("language", vocab, row) for row in range(4)])

    def tokens(seed: int) -> list[list[int]]:
        selector = Selector(4, loader=COMPILED)
        for slot in range(4):
            selector.enter(slot, sequence(slot, fields, vocab, seed + slot))
        return [selector.choose(logits, [0, 1, 2, 3]).tokens for _ in range(steps)]

    wanted = [tokens(seed) for seed in range(4)]
    found: dict[int, list[list[int]]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: tokens(seed)}))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        joined(thread)
    assert [found[seed] for seed in range(4)] == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
        {"temperature": 0.8, "top_k": 50, "presence_penalty": 0.5, "min_tokens": 90},
        {"repetition_penalty": 1.1, "frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_a_step_reads_the_logits_once_and_copies_none(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, num_rows = 49_152, 16
    passes = []
    find_heads = kernels.find_heads
    monkeypatch.setattr(kernels, "find_heads", lambda *a: passes.append(1) or find_heads(*a))
    monkeypatch.setattr(CategoricalSampler, "draw", lambda *_: pytest.fail("numpy draws"))
    selector = Selector(num_rows, loader=COMPILED)
    for slot in range(num_rows):
        selector.enter(slot, sequence(slot, fields, vocab, slot))
    logits = np.stack([logits_of("language", vocab, row) for row in range(num_rows)])
    slots = list(range(num_rows))
    selector.choose(logits, slots)
    passes.clear()
    tracemalloc.start()
    try:
        for _ in range(10):
            selector.choose(logits, slots)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(passes) == 10
    assert peak < vocab * 4, "something as large as a row of logits was made"


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_numpy_is_asked_about_few_rows_whose_place_is_in_the_tail(
    top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_tail, asked = [], []
    find_token, token = tail.find_token, Unsettled.token
    monkeypatch.setattr(tail, "find_token", lambda *a: in_tail.append(1) or find_token(*a))
    monkeypatch.setattr(Unsettled, "token", lambda *a: asked.append(1) or token(*a))
    selector = Selector(8, loader=COMPILED)
    for slot in range(8):
        fields = {"temperature": 1.0, "top_p": top_p}
        selector.enter(slot, sequence(slot, fields, 12_301, slot))
    logits = np.stack([logits_of("language", 12_301, row) for row in range(8)])
    for _ in range(60):
        selector.choose(logits, list(range(8)))
    assert len(in_tail) > 100
    assert len(asked) < len(in_tail) / 10


@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "huge"]),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    share_above=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_rough_sums_are_within_their_bounds(
    kind: str, temperature: float, share_above: float, seed: int
) -> None:
    logits = logits_of(kind, 12_301, seed)
    best, exact = logits.max(), logits.astype(np.float64)
    weights = np.exp((exact - exact.max()) / temperature)
    scale = math.log2(math.e) / temperature
    bound = np.sort(logits)[int(share_above * (logits.size - 1))]
    wanted = weights[logits > bound].sum()
    found = tail._weight_above(logits, best, scale, bound)
    assert abs(found - wanted) <= (tail.ROUGH - 1e-5) * wanted + 1e-30
    length = kernels._length(logits, best, scale)
    assert abs(length - weights.sum()) <= (kernels.ROUGH - 1e-4) * weights.sum() + 1e-30


KERNEL = """
from typing import NamedTuple
import numpy as np
from qaic_ray.engine.compiled import jit

class NAME(NamedTuple):
    values: np.ndarray
    others: np.ndarray

@jit.kernel(jit.tuple_of(NAME, jit.INT64[1], jit.FLOAT64[1]))
def last(given):
    return given.values[-1]

assert last(NAME(np.arange(5), np.zeros(1))) == 4
"""


@pytest.mark.parametrize("damage", ["renamed", "torn"])
def test_a_cache_of_another_version_is_made_anew(tmp_path: Path, damage: str) -> None:
    module = tmp_path / "some_kernel.py"

    def load(name: str) -> set[tuple[str, int]]:
        module.write_text(KERNEL.replace("NAME", name))
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import some_kernel"
        subprocess.run([sys.executable, "-B", "-c", code], check=True, timeout=120)
        return {(path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.nbi")}

    before = load("Before")
    assert len(before) == 1
    assert load("Before") == before
    if damage == "torn":
        for path in tmp_path.rglob("*.nbi"):
            path.write_bytes(path.read_bytes()[:-20])
    after = load("After" if damage == "renamed" else "Before")
    assert {name for name, _ in after} == {name for name, _ in before}
    assert after != before


class TestLoader:
    def test_a_process_of_few_tokens_never_begins(self) -> None:
        loader = KernelLoader(10, "no.such.module")
        assert [loader.kernels(3) for _ in range(3)] == [None] * 3
        assert loader._thread is None

    def test_numpy_chooses_until_the_kernels_are_there(self) -> None:
        loader = KernelLoader(10)
        assert loader.kernels(10) is None  # it begins, and nobody waits
        assert loader.wait() is chooser
        assert loader.kernels(1) is chooser

    def test_tokens_are_the_same_before_and_after(self) -> None:
        vocab, fields = 8205, {"temperature": 0.9, "frequency_penalty": 0.2}
        logits = np.stack([logits_of("language", vocab, row) for row in range(2)])
        loader = KernelLoader(20)
        changing, reference = Selector(2, loader=loader), Selector(2, loader=NUMPY)
        for selector in (changing, reference):
            for slot in range(2):
                selector.enter(slot, sequence(slot, fields, vocab, slot))
        for step in range(80):
            if step == 20:
                loader.wait()
            found = changing.choose(logits, [0, 1]).tokens
            assert found == reference.choose(logits, [0, 1]).tokens
            assert changing._group is not None
            assert step < 20 or changing._group.compiled is not None

    def test_without_numba_numpy_goes_on_and_says_so_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "numba", None)
        for name in list(sys.modules):
            if name.startswith("qaic_ray.engine.compiled.") and not name.endswith("loader"):
                monkeypatch.delitem(sys.modules, name)
        loader = KernelLoader(1)
        monkeypatch.setattr(loader, "_fill_cache", lambda: None)
        with caplog.at_level("WARNING"):
            assert loader.wait() is None
            assert [loader.kernels(5) for _ in range(3)] == [None] * 3
        assert caplog.text.count("Sampling goes on with numpy") == 1

    def test_a_numba_that_is_switched_off_is_left_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chooser, "IS_COMPILED", False)
        assert KernelLoader(1).wait() is None

    def test_many_threads_begin_it_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loads = []
        monkeypatch.setattr(KernelLoader, "_load", lambda _: loads.append(1))
        loader = KernelLoader(1)
        threads = [threading.Thread(target=loader.kernels, args=(1,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            joined(thread)
        assert loads == [1]

    def test_what_is_not_cached_is_compiled_by_another_process_and_then_loaded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran = []
        guarded = loader_module.guarded

        def noted(argv: list[str], *rest: Any, **options: Any) -> Any:
            ran.append(argv)
            return guarded(argv, *rest, **options)

        monkeypatch.setattr(loader_module, "guarded", noted)
        monkeypatch.setattr(loader_module, "_is_cached", lambda: False)
        assert KernelLoader(1).wait() is chooser
        assert [argv[0] for argv in ran] == [sys.executable]

    def test_a_process_that_ends_waits_for_no_compiler(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "takes_for_ever.py").write_text(
            f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text("
            "str(os.getpid()))\ntime.sleep(600)"
        )
        program = (
            "import pathlib, sys, time\n"
            f"sys.path.insert(0, {str(tmp_path)!r})\n"
            "from qaic_ray.engine.compiled import loader\n"
            "loader._is_cached = lambda: False\n"
            "assert loader.KernelLoader(1, 'takes_for_ever').kernels(1) is None\n"
            f"pid = pathlib.Path({str(tmp_path / 'pid')!r})\n"
            "while not (pid.exists() and pid.read_text()): time.sleep(0.01)\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
        pid = int((tmp_path / "pid").read_text())
        assert not psutil.pid_exists(pid)
