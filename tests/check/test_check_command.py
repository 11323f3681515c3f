"""`qaic-ray check` as it is typed: what is printed, the exit codes, and what is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_artifacts import SHAPES, folder_of, named, partition, program, qefficient, shapes

from qaic_ray.cli import main
from qaic_ray.emulator.container import Container

Run = Callable[..., tuple[int, str, str]]
FOR = ("--sdk-version", "1.20", "--sku", "standard")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The exit code of a line, its stdout and its stderr."""
    monkeypatch.chdir(tmp_path)

    def typed(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qaic-ray", "check", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, said.out, said.err

    return typed


def test_nothing_found_is_0(run: Run, tmp_path: Path) -> None:
    shapes(*SHAPES)(tmp_path)
    code, out, _ = run("specializations.json", *FOR)
    assert code == 0
    assert out == "Nothing found, for Apps 1.20 and Standard cards.\n"


def test_a_refusal_is_1_with_remedy_and_source(run: Run, tmp_path: Path) -> None:
    shapes(*named(*SHAPES))(tmp_path)
    code, out, _ = run("specializations.json", *FOR)
    assert code == 1
    assert "refused specializations.json: Its entries are named" in out
    assert "--convert FOLDER" in out
    assert "https://github.com/quic/efficient-transformers/issues/1129" in out
    assert out.endswith("1 would be refused, for Apps 1.20 and Standard cards.\n")


def test_a_remark_is_0(run: Run, tmp_path: Path) -> None:
    shapes(*SHAPES, SHAPES[1])(tmp_path)
    code, out, _ = run("specializations.json", *FOR)
    assert code == 0
    assert out.endswith("1 remark, for Apps 1.20 and Standard cards.\n")


def test_json_has_every_finding(run: Run, tmp_path: Path) -> None:
    shapes(*named(*SHAPES))(tmp_path)
    code, out, _ = run("specializations.json", *FOR, "--json")
    assert code == 1
    document = json.loads(out)
    assert not document["ok"]
    assert document["sdk_version"] == "1.20"
    assert document["sku"] == "Standard"
    (one,) = document["findings"]
    assert one["rule"] == "specializations-named"
    assert one["grade"] == "refused"


WRONG = {
    "nothing there": (("gone.onnx",), "is not there"),
    "nothing known": (("notes.txt",), "is nothing that can be checked"),
    "an empty folder": (("empty",), "holds nothing that can be checked"),
    "no version": (("s.json", "--sdk-version", "new"), "like 1.20"),
    "no card": (("s.json", "--sku", "a100"), "standard, pro, ultra"),
    "a folder that is there": (("s.json", "--convert", "empty"), "is there already"),
    "JSON of nobody": (("other.json",), "is nothing that can be checked"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_2_and_one_sentence(name: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "other.json").write_text("{}")
    shapes(*SHAPES)(tmp_path).rename(tmp_path / "s.json")
    words, says = WRONG[name]
    code, out, err = run(*words, *(FOR if "--s" not in " ".join(words) else ()))
    assert code == 2
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"empty", "s.json"}


def test_a_whole_cache_is_converted_beside_it(run: Run, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    make = qefficient(entries=named(*SHAPES), mdp_file=partition([(2, 16), (3, 16)], ()), cores=1)
    make(cache)
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    code, out, _ = run("cache", *FOR, "--convert", "new")
    assert code == 1
    assert out.count("converted") == 2
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
    inner = Path("LlamaForCausalLM/LlamaForCausalLM-0123456789abcdef/qpc-fedcba9876543210")
    made = tmp_path / "new" / inner
    assert sorted(path.name for path in made.iterdir()) == ["mdp_ts_2.json", "specializations.json"]
    assert json.loads((made / "specializations.json").read_text()) == {
        "specializations": [dict(entry) for entry in SHAPES]
    }
    for file in made.iterdir():
        assert run(str(file), *FOR)[0] == 0
    assert run("cache", *FOR, "--convert", "new")[0] == 2


def test_nothing_to_convert_makes_no_folder(run: Run, tmp_path: Path) -> None:
    shapes(*SHAPES)(tmp_path)
    assert run("specializations.json", *FOR, "--convert", "new")[0] == 0
    assert not (tmp_path / "new").exists()


def test_the_sdk_and_cards_here_are_what_counts(run: Run, tmp_path: Path) -> None:
    program(tmp_path, cores=16)
    code, out, _ = run("programqpc.bin", "--sdk", "emulated")
    assert code == 1
    assert "a Standard SoC has 14" in out
    assert run("programqpc.bin", "--sdk", "emulated", "--sku", "ultra")[0] == 0


def test_a_folder_names_its_files_below_it(run: Run, tmp_path: Path) -> None:
    folder_of(entries=named(*SHAPES))(tmp_path)
    code, out, _ = run(".", *FOR)
    assert code == 1
    assert "refused specializations.json:" in out
    assert Container(str(program(tmp_path / "q"))).segments
