"""Whether an SDK reads a checkpoint's weights: tried once, with compilers of a few lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_store import GOOD, make_sdk

from qaic_ray.compile.probe import PROBES_FOLDER, check_reads_weights, reads_weights
from qaic_ray.errors import CompileError, UsageError
from qaic_ray.files.folders import CACHE_VARIABLE

MODEL = 'for arg in "$@"; do case $arg in -m=*) folder=$(dirname "${arg#*=}");; esac; done\n'
FAILS = 'echo run >> "$(dirname "$0")/runs"; echo no >&2; exit 1\n'
# Of the three probes: whose file is there, whose file is not, and which holds its weights itself.
READS = MODEL + f"case $folder in *-away) {FAILS} ;; esac\n{GOOD}"
IGNORES = GOOD
REFUSES = MODEL + f"case $folder in *-there|*-away) {FAILS} ;; esac\n{GOOD}"
BROKEN = FAILS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def num_runs(root: Path) -> int:
    return (root / "exec" / "runs").read_text().count("run")


@pytest.mark.parametrize(
    ("script", "reads", "runs"), [(READS, True, 2), (IGNORES, False, 2), (REFUSES, False, 2)]
)
def test_a_compiler_is_tried_once(tmp_path: Path, script: str, reads: bool, runs: int) -> None:
    sdk = make_sdk(tmp_path / "sdk", script)
    assert reads_weights(sdk, ["F32"]) is reads
    assert num_runs(sdk.root) == runs
    assert reads_weights(sdk, ["F32", "F32"]) is reads
    assert num_runs(sdk.root) == runs
    # Another type of weights, or another compiler, is another question.
    assert reads_weights(sdk, ["BF16"]) is reads
    assert num_runs(sdk.root) == 2 * runs
    sdk.compiler.write_text(f"{sdk.compiler.read_text()}# newer\n")
    assert reads_weights(sdk, ["F32"]) is reads
    assert num_runs(sdk.root) == 3 * runs


def test_a_compiler_that_compiles_nothing_says_so_and_nothing_is_kept(tmp_path: Path) -> None:
    sdk = make_sdk(tmp_path / "sdk", BROKEN)
    with pytest.raises(CompileError, match="exit code 1: no"):
        reads_weights(sdk, ["F32"])
    assert not (tmp_path / "cache" / PROBES_FOLDER).exists()
    make_sdk(tmp_path / "sdk", READS)
    assert reads_weights(sdk, ["F32"])


def test_a_damaged_note_is_no_answer(tmp_path: Path) -> None:
    sdk = make_sdk(tmp_path / "sdk", READS)
    assert reads_weights(sdk, ["F32"])
    (note,) = (tmp_path / "cache" / PROBES_FOLDER).iterdir()
    for damaged in ("{", "[]", '{"sdk": "x"}', '{"reads": 1}'):
        note.write_text(damaged)
        assert reads_weights(sdk, ["F32"]), damaged


def test_the_refusal_says_what_to_do(tmp_path: Path) -> None:
    sdk = make_sdk(tmp_path / "sdk", IGNORES)
    with pytest.raises(UsageError, match=r"real SDK 1\.20 reads no weights .*--weights copy\.$"):
        check_reads_weights(sdk, ["F32"])
