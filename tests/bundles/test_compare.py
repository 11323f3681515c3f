"""Two bundles compared: the first difference named, by bits or within a tolerance, or refused."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import counts, put_through
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from mutations import documents, texts

from qaic_ray.bundles.compare import BundleComparison, compare_bundles, read_bundle
from qaic_ray.bundles.record import BATCH_FILE, FACTS_FILE, BundleWriter
from qaic_ray.cli import main
from qaic_ray.errors import UsageError

X = {"x": np.arange(6, dtype=np.int64).reshape(2, 3)}


def bundle(folder: Path, outputs: list[dict[str, Any]], inputs: Any = X, most: int = 100) -> Path:
    writer = BundleWriter(folder, most, {"qpc": "q"})
    for output in outputs:
        writer.add(inputs, output)
    writer.close()
    return writer.folder


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["qaic-ray", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def compared(first: Path, second: Path, tolerance: float | None = None) -> BundleComparison:
    return compare_bundles(read_bundle(first), read_bundle(second), tolerance=tolerance)


def test_a_bundle_is_private_and_whole_after_each_execution(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "runs" / "card-0", 2, {"qpc": "q"})
    assert read_bundle(writer.folder).executions == []
    for number in (1, 2, 2):
        writer.add(X, {"a/b": np.zeros(2, np.float16)})
        assert len(read_bundle(writer.folder).executions) == number
    assert writer.is_full
    paths = [writer.folder, *writer.folder.rglob("*")]
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths if p.is_dir()} == {0o700}
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths if p.is_file()} == {0o600}
    facts = json.loads((writer.folder / FACTS_FILE).read_text())
    assert facts == {"format": 1, "qpc": "q", "dtypes": {"x": "int64", "a/b": "float16"}}
    assert bundle(tmp_path / "runs" / "card-0", []).name == "card-0-2"


def test_the_first_execution_tensor_and_element_are_named(tmp_path: Path) -> None:
    plain = [{"y": np.zeros((2, 4), np.float32), "z": np.ones(3, np.int32)} for _ in range(4)]
    changed = [{name: array.copy() for name, array in output.items()} for output in plain]
    changed[2]["z"][1] = 5
    changed[2]["z"][2] = 6
    changed[3]["y"][0, 0] = 1
    first, second = bundle(tmp_path / "a", plain), bundle(tmp_path / "b", changed)
    assert compared(first, first) == BundleComparison(4, 0.0, None)
    found = compared(first, second).difference
    assert found is not None
    assert found.text == "execution 2, output z at [1]: 1 and 5"


@given(
    npst.arrays(np.float32, (3, 5), elements=st.floats(width=32)),
    st.integers(0, 14),
    st.floats(width=32),
    st.sampled_from([None, 0.0, 1e-3, 0.5]),
)
def test_an_element_is_named_where_a_formula_says_so(
    tmp_path_factory: pytest.TempPathFactory,
    values: Any,
    place: int,
    other: float,
    tolerance: float | None,
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    changed = values.copy()
    changed.flat[place] = other
    found = compared(
        bundle(folder / "a", [{"y": values}]), bundle(folder / "b", [{"y": changed}]), tolerance
    ).difference
    a, b = values.flat[place], changed.flat[place]
    if tolerance is None:
        differs = a.tobytes() != b.tobytes()
    else:
        with np.errstate(all="ignore"):
            far = abs(float(a) - float(b)) > tolerance + tolerance * abs(float(b))
        same = a == b or (np.isnan(a) and np.isnan(b))
        differs = not same and bool(far or np.isnan(a) != np.isnan(b) or np.isinf([a, b]).any())
    assert (found is not None) == differs
    if found is not None:
        assert found.element == tuple(int(i) for i in np.unravel_index(place, values.shape))
        assert found.first != found.second


def test_other_types_shapes_names_and_numbers_of_executions(tmp_path: Path) -> None:
    wide = bundle(tmp_path / "wide", [{"y": np.zeros(2, np.float32)}])
    half = bundle(tmp_path / "half", [{"y": np.zeros(2, np.float16)}])
    found = compared(wide, half).difference
    assert found is not None
    assert (found.first, found.second) == ("float32 [2]", "float16 [2]")
    assert compared(wide, half, 0.0).difference is None  # an fp16 program's beside an fp32 one's
    longer = bundle(tmp_path / "long", [{"y": np.zeros(3, np.float32)}])
    found = compared(wide, longer, 1.0).difference
    assert found is not None
    assert found.second == "float32 [3]"
    more = bundle(tmp_path / "more", [{"y": np.zeros(2, np.float32)}] * 2)
    found = compared(wide, more).difference
    assert found is not None
    assert "1 executions and 2 executions" in found.text
    named = bundle(tmp_path / "named", [{"w": np.zeros(2, np.float32)}])
    found = compared(wide, named).difference
    assert found is not None
    assert "output y" in found.text
    given = bundle(tmp_path / "given", [{"y": np.zeros(2, np.float32)}], {"x": X["x"] + 1})
    found = compared(wide, given).difference
    assert found is not None
    assert found.text == "execution 0, input x at [0, 0]: 0 and 1"


def test_outputs_of_the_runner_have_the_types_of_the_bundle_beside_them(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0], np.float16)
    first = bundle(tmp_path / "a", [{"p/y": values}] * 11)
    outputs = tmp_path / "out"
    outputs.mkdir()
    for number in range(11):
        values.tofile(outputs / f"p_y-activation-0-inf-{number}.bin")
    assert compared(first, outputs) == BundleComparison(11, 0.0, None)
    np.array([1.5, -1.0], np.float16).tofile(outputs / "p_y-activation-0-inf-10.bin")
    found = compared(outputs, first).difference
    assert found is not None
    assert found.text == "execution 10, output p_y at [1]: -1.0 and -2.0"


def outputs_of(folder: Path, activations: dict[int, list[float]]) -> Path:
    """A folder as `qaic-runner -a` leaves it: one float32 an execution, by activation."""
    folder.mkdir()
    for activation, values in activations.items():
        for number, value in enumerate(values):
            path = folder / f"y-activation-{activation}-inf-{number}.bin"
            np.array([value], np.float32).tofile(path)
    return folder


@given(
    st.dictionaries(
        st.integers(0, 12), st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=2
    ),
    st.data(),
)
def test_several_activations_are_compared_whole(
    tmp_path_factory: pytest.TempPathFactory, values: dict[int, list[float]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("activations")
    first = outputs_of(folder / "a", values)
    assert compared(first, first) == BundleComparison(sum(map(len, values.values())), 0.0, None)
    activation = data.draw(st.sampled_from(sorted(values)))
    place = data.draw(st.integers(0, len(values[activation]) - 1))
    changed = {number: list(each) for number, each in values.items()}
    changed[activation][place] += 4
    found = compared(first, outputs_of(folder / "b", changed))
    assert found.difference is not None
    before = sum(len(each) for number, each in values.items() if number < activation)
    assert found.executions == before + place
    assert found.difference.text == (
        f"activation {activation}, execution {place}, output y at [0]: "
        f"{float(values[activation][place])} and {float(changed[activation][place])}"
    )


def test_one_activation_is_that_of_a_bundle_whatever_its_number(tmp_path: Path) -> None:
    batch = bundle(tmp_path / "a", [{"y": np.array([v], np.float32)} for v in (1, 2)])
    written = outputs_of(tmp_path / "b", {1: [1, 3]})
    found = compared(batch, written).difference
    assert found is not None
    assert found.text == "execution 1, output y at [0]: 2.0 and 3.0"


def test_other_activations_are_refused_with_the_option(tmp_path: Path) -> None:
    batch = bundle(tmp_path / "a", [{"y": np.array([1], np.float32)}])
    two = outputs_of(tmp_path / "two", {0: [1], 1: [1]})
    for pair in ((batch, two), (two, batch)):
        with pytest.raises(UsageError, match=r"of activations 0, 1, and .*again without -a"):
            compared(*pair)
    others = {
        "one": {0: [1.0]},
        "three": {0: [1.0], 1: [1.0], 2: [1.0]},
        "else": {0: [1.0], 2: [1.0]},
    }
    for name, values in others.items():
        with pytest.raises(UsageError, match=r"of activations .* with one -a for both"):
            compared(two, outputs_of(tmp_path / name, values))
    fewer = outputs_of(tmp_path / "fewer", {0: [1], 1: [1, 2]})
    with pytest.raises(UsageError, match=r"no outputs of execution 1 of activation 1, and"):
        compared(two, fewer)


@pytest.mark.parametrize("written", [range(1), range(2), range(1, 3), range(2, 3)])
def test_what_the_runner_did_not_write_is_said_with_the_option(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    written: range,
) -> None:
    values = np.zeros(2, np.float32)
    first = bundle(tmp_path / "a", [{"y": values}] * 3)
    outputs = tmp_path / "out"
    outputs.mkdir()
    for number in written:
        values.tofile(outputs / f"y-activation-0-inf-{number}.bin")
    missing = next(number for number in range(3) if number not in written)
    for pair in ([first, outputs], [outputs, first]):
        assert run(["compare", *map(str, pair)], monkeypatch) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"has no outputs of execution {missing}," in said
        assert "--write-output-num-samples 3" in said
    if 0 in written:  # what differs before that is found first
        (values + 1).tofile(outputs / "y-activation-0-inf-0.bin")
        found = compared(first, outputs).difference
        assert found is not None
        assert found.text == "execution 0, output y at [0]: 0.0 and 1.0"


def test_a_bundle_without_facts_is_read_by_the_sizes_of_elements(tmp_path: Path) -> None:
    """As QEfficient's artifact-only mode leaves one."""
    first = bundle(tmp_path / "a", [{"y": np.array([1, 2], np.float32)}])
    (first / FACTS_FILE).unlink()
    second = bundle(tmp_path / "b", [{"y": np.array([1, 2.5], np.float32)}])
    found = compared(first, second).difference
    assert found is not None
    assert found.text.endswith("at [1]: 2.0 and 2.5")


REFUSED: dict[str, tuple[Any, str]] = {
    "no bundle": (lambda f: shutil.rmtree(f) or f.mkdir(), "is no bundle"),
    "not there": (shutil.rmtree, "is not there: give a bundle"),
    "no lists": (
        lambda f: (f / BATCH_FILE).write_text('{"IO-files": 3}'),
        "IO-files: must be a list, not 3: give a bundle of .*, or a folder of outputs",
    ),
    "lists of something else": (
        lambda f: (f / BATCH_FILE).write_text('{"IO-files": [[1]]}'),
        r"IO-files: \[0\]\[0\]: must be an object, not 1: give a bundle",
    ),
    "another document": (
        lambda f: (f / BATCH_FILE).write_text('{"results": []}'),
        "is no bundle, since it has no IO-files: give a bundle",
    ),
    "no object": (lambda f: (f / BATCH_FILE).write_text("[[]]"), "is no bundle, since"),
    "a file is gone": (lambda f: shutil.rmtree(f / "data"), "is not there, or is not a file"),
    "a file is short": (
        lambda f: (f / "data" / "000000-out-y.raw").write_bytes(b"123"),
        r"has 3 bytes, which is not \[2\] of float32",
    ),
    "a type that is none": (
        lambda f: (f / FACTS_FILE).write_text('{"dtypes": {"y": "object"}}'),
        "which is no type",
    ),
    "out of the folder": (
        lambda f: (f / BATCH_FILE).write_text(
            '{"IO-files": [[{"path": "../x", "io-direction": "in", "map-to": "x"}]]}'
        ),
        "a path leads out of the folder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_bundle_is_refused_with_a_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    change, text = REFUSED[name]
    good = bundle(tmp_path / "good", [{"y": np.zeros(2, np.float32)}])
    bad = bundle(tmp_path / "bad", [{"y": np.zeros(2, np.float32)}])
    change(bad)
    with pytest.raises(UsageError, match=text):
        compared(good, bad)
    assert run(["compare", str(good), str(bad)], monkeypatch) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_says_it_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bundle(tmp_path / "a", [{"y": np.zeros(2, np.float32)}])
    second = bundle(tmp_path / "b", [{"y": np.array([0, 0.25], np.float32)}])
    assert run(["compare", str(first), str(second)], monkeypatch) == 1
    assert capsys.readouterr().out == (
        "They differ in execution 0, output y at [1]: 0.0 and 0.25.\n"
    )
    assert run(["compare", str(first), str(second), "--tolerance", "0.3"], monkeypatch) == 0
    assert "1 executions are within 0.3; the largest" in capsys.readouterr().out
    assert run(["compare", str(first), str(second), "--json"], monkeypatch) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["equal"] is False
    assert said["difference"]["element"] == [1]


def odd_bundles(folder: Path, seed: int, number: int) -> Iterator[tuple[Path, bytes]]:
    """Batches and the facts beside them, by their structure and by their bytes."""
    for name in (BATCH_FILE, FACTS_FILE):
        text = (folder / name).read_text()
        for value in documents(json.loads(text), seed, number // 4):
            yield folder / name, json.dumps(value).encode()
        for data in texts(text, seed, number // 4):
            yield folder / name, data


@pytest.mark.parametrize("number", counts())
def test_odd_bundles_are_read_or_refused_in_a_line(tmp_path: Path, number: int) -> None:
    first = read_bundle(bundle(tmp_path / "first", [{"y": np.zeros(2, np.float32)}]))
    second = bundle(tmp_path / "second", [{"y": np.zeros(2, np.float32)}])
    good = {name: (second / name).read_bytes() for name in (BATCH_FILE, FACTS_FILE)}

    def read(odd: tuple[Path, bytes]) -> None:
        path, data = odd
        path.write_bytes(data)
        try:
            for tolerance in (None, 0.1):
                compare_bundles(first, read_bundle(second), tolerance=tolerance)
        finally:
            path.write_bytes(good[path.name])

    found = put_through("compare", odd_bundles(second, number, number), read, (UsageError,))
    assert sum(found) == number
    assert 0 < found.read < number
