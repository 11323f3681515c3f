"""What a newcomer types wrong is one sentence with the remedy and exit code 2, at every command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qaic_ray.cli import main


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty folder, files that hold nothing of ours, and a folder of no QPC."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QAIC_RAY_CACHE", str(tmp_path / "cache"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "QAIC_RAY_SDK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "misspelt.yaml").write_text("name: m\nmodel: {name: x}\nrun: {promtps: 3}\n")
    (tmp_path / "qpc").mkdir()
    (tmp_path / "qpc" / "programqpc.bin").write_bytes(b"of another SDK")
    return tmp_path


WRONG = [
    ("check nowhere", "nowhere is not there: give an .onnx file"),
    ("check folder", "folder holds nothing that can be checked: give an .onnx file"),
    ("check file --sku giant", "--sku is 'giant': give standard, pro, ultra."),
    ("compare nowhere folder", "nowhere is not there: give a bundle"),
    ("compare folder qpc", "folder is no bundle"),
    ("compare folder qpc --tolerance -1", "--tolerance must be at least 0.0, not -1.0."),
    ("merge nowhere", "`qaic-ray runs` lists them."),
    ("merge folder --part-rows 0", "--part-rows must be at least 1, not 0."),
    ("schema folder", "folder is not a file."),
    ("export nowhere --weights reference", "There is no model 'nowhere'"),
    ("export folder --weights reference", "folder is no checkpoint: it has no config.json."),
    ("export folder --weights refrence", "--weights takes copy or reference, not 'refrence'."),
    ("emulator install file", "is a file; name a folder."),
    ("emulator install qpc", "was not made by this tool"),
    ("emulator install new --cards 1000", "--cards must be at most 64, not 1000."),
    ("emulator run -- no-such-program", "Cannot run no-such-program"),
    ("emulator run --sdk nowhere -- qaic-util", "name the one that is there, or give --sdk emul"),
    ("key a+b", "A key's name is up to 64 letters"),
    ("serve misspelt.yaml", "unknown key 'run.promtps'; did you mean 'prompts'?"),
    ("serve empty.yaml", "must hold a mapping with at least 'name' and 'model'."),
    ("serve qpc", "is the folder of a QPC: say whose, with -m and the model."),
    ("serve folder --port 99999", "--port must be at most 65535, not 99999."),
    ("devices --sdk folder", "folder is not a Cloud AI SDK folder"),
    ("doctor --address 127.0.0.1:1", "leave --address out to start one here."),
    ("report folder", "`qaic-ray runs` lists them."),
    ("status nowhere", "nowhere is no run folder, runs has none of that name, and of a job nothing "
                       "is known: No Ray runs on this machine"),
    ("logs nowhere", "nowhere is no run folder, runs has none of that name, and of a job nothing "),
    ("stop nowhere", "nowhere is no run folder, runs has none of that name, and of a job nothing "),
    ("show nowhere 0", "`qaic-ray runs` lists them."),
    ("monitoring file", "name a new folder, or your own."),
]  # fmt: skip


@pytest.mark.parametrize(("line", "told"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_word_is_one_sentence_with_its_remedy(
    desk: Path,
    line: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path for path in desk.iterdir() if path.name != "cache"}
    monkeypatch.setattr(sys, "argv", ["qaic-ray", *line.split()])
    # No Ray of this machine has jobs: other tests' ones are not asked.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert stopped.value.code == 2, said.err
    assert told in said.err
    assert "Traceback" not in said.err
    last = said.err.splitlines()[-1]
    assert last.startswith("qaic-ray: ")
    assert last.endswith((".", "?"))
    assert "error:" not in last
    assert "Input should" not in last
    assert {path for path in desk.iterdir() if path.name != "cache"} == before
