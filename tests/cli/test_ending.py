"""What a command says in the end, and its exit code, by what ended it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from qaic_ray.cli import end
from qaic_ray.errors import (
    ClusterLost,
    CompileError,
    JobError,
    QaicRayError,
    Unfinished,
)
from qaic_ray.files.folders import CACHE_VARIABLE


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (JobError("No."), 2, "No."),
        (CompileError("No."), 1, "No."),
        (Unfinished("7 rows are safe."), 75, "7 rows are safe."),
        (caused(Unfinished("7 rows."), QaicRayError("full")), 75, "7 rows."),
        (ClusterLost("Gone."), 75, "Gone. Give the command again: what is done is kept."),
        (KeyboardInterrupt("stopped: 7 rows."), 130, "stopped: 7 rows."),
        (KeyboardInterrupt(), 130, "stopped by SIGINT; what is done is kept."),
    ],
)
def test_errors_that_are_foreseen(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        end(error, debug=False)
    assert (caught.value.code, capsys.readouterr().err) == (code, f"qaic-ray: {words}\n")


@pytest.mark.parametrize("in_a_run", [False, True])
def test_a_fault_is_one_sentence_that_names_a_file(
    in_a_run: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    fault = KeyError("x" * 1000 + "\nmore")
    error = caused(Unfinished("7 rows are safe."), fault) if in_a_run else fault
    with pytest.raises(SystemExit) as caught:
        end(error, debug=False)
    said = capsys.readouterr().err
    assert caught.value.code == 70
    assert said.count("\n") == 1
    assert len(said) < 700
    assert ("7 rows are safe." in said) == in_a_run
    (file,) = (tmp_path / "cache" / "tracebacks").iterdir()
    assert f"A fault of qaic-ray (KeyError). Its traceback is in {file};" in said
    assert "KeyError: 'xxx" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_traceback_that_is_asked_for_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        end(ValueError("odd"), debug=True)
    assert "ValueError: odd\nqaic-ray: odd. A fault" in capsys.readouterr().err
