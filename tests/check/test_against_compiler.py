"""The emulated compiler refuses what is found, and takes what that is converted to."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_artifacts import COMMAND, DECODE, PREFILL, SHAPES, Maker, mdp, named, shapes, text_file
from situations import ALL

from qaic_ray.check.artifacts import read_artifacts
from qaic_ray.check.checks import findings, refused
from qaic_ray.check.conversions import conversions
from qaic_ray.check.facts import Target
from qaic_ray.emulator import compiler
from qaic_ray.emulator.compiler import configs
from qaic_ray.limits import CARDS, version_of

STANDARD = CARDS["PCIe"]
SYMBOLS = [f"-onnx-define-symbol={name},{size}" for name, size in PREFILL.items()]


def compiled(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, apps: str) -> int:
    """The compiler's status for a graph alone."""
    monkeypatch.setenv(compiler.VERSION_VARIABLE, apps)
    hardware = "ai100" if version_of(apps) >= (1, 21) else "2.0"
    words = [w for w in COMMAND[1:] if not w.startswith(("-m=", "-aic-hw-version"))]
    words += [f"-m={path}", f"-aic-hw-version={hardware}", f"-aic-binary-dir={folder / 'qpc'}"]
    return compiler.main([*words, *SYMBOLS])


GRAPHS = (
    "an ONNX file that is none",
    "weights that are not there",
    "weights elsewhere",
    "weights that are cut",
    "an operator that nobody knows",
    "an operator of another vendor",
    "a double for a buffer",
)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_compiler_refuses_such_graphs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ALL[name].make(tmp_path)
    assert refused(findings(read_artifacts(path), Target()))
    assert compiled(path, tmp_path, monkeypatch, "1.22") != 0


SHAPE_FILES = (
    "named for an SDK before 1.22",
    "numbers in place of strings",
    "not JSON",
    "no list",
    "an entry is no object",
    "a size of zero",
    "a size that is a word",
)


@pytest.mark.parametrize("name", SHAPE_FILES)
def test_the_compiler_refuses_such_shapes(name: str, tmp_path: Path) -> None:
    path = ALL[name].make(tmp_path)
    with pytest.raises(configs.ConfigError):
        configs.read_specializations(str(path), named=False)


CUSTOM_IO = ("a line that is none", "a precision that is none")
MDP = ("MDP that is not JSON", "MDP without devices", "MDP with QIDs")


@pytest.mark.parametrize("name", CUSTOM_IO + MDP)
def test_the_compiler_refuses_such_files(name: str, tmp_path: Path) -> None:
    path = ALL[name].make(tmp_path)
    read = configs.read_custom_io if name in CUSTOM_IO else configs.read_partition
    with pytest.raises(configs.ConfigError):
        read(str(path))


CONVERTED: dict[str, tuple[Maker, str]] = {
    "named": (shapes(*named(*SHAPES)), "1.20"),
    "numbers": (shapes({k: int(v) for k, v in PREFILL.items()}, DECODE), "1.22"),
    "numbers in names": (
        shapes(*named({k: int(v) for k, v in PREFILL.items()}, DECODE)),  # type: ignore[dict-item]
        "1.22",
    ),
    "other names": (
        shapes({"batch_size": "1", "prompt_length": "8", "context_len": "64"}, DECODE),
        "1.22",
    ),
    "compute contexts": (
        shapes(*({**entry, "comp_ctx_lengths": "64"} for entry in SHAPES)),
        "1.22",
    ),
    "half a state": (
        text_file("custom_io.yaml", " - IOName: past_key.0\n   Precision: float16\n"),
        "1.22",
    ),
    "QIDs": (mdp([(4, 16), (7, 14)], connections=()), "1.22"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_is_converted_is_right(name: str, tmp_path: Path) -> None:
    make, apps = CONVERTED[name]
    target = Target(version_of(apps), STANDARD)
    path = make(tmp_path)
    before = path.read_bytes()
    (artifact,) = read_artifacts(path)
    assert refused(findings([artifact], target))
    (made,) = conversions(artifact, target)
    assert path.read_bytes() == before
    other = tmp_path / "converted"
    other.mkdir()
    new = other / made.place
    new.write_text(made.text)
    (again,) = read_artifacts(new)
    assert refused(findings([again], target)) == []
    assert conversions(again, target) == []
    if "specializations" in made.place:
        read = configs.read_specializations(str(new), named=version_of(apps) >= (1, 22))
        assert [entry["seq_len"] for entry in read] == [8, 1]
    elif new.suffix == ".yaml":
        assert configs.read_custom_io(str(new)) == {
            "past_key.0": "float16",
            "past_key.0_RetainedState": "float16",
        }
    else:
        assert configs.read_partition(str(new)) == configs.Partition(2, 14)


def test_nothing_is_converted_of_what_is_right(tmp_path: Path) -> None:
    for make in (shapes(*SHAPES), mdp([(0, 14), (1, 14)])):
        (artifact,) = read_artifacts(make(tmp_path))
        assert conversions(artifact, Target(version_of("1.22"), STANDARD)) == []
