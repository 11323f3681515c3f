"""Builds by content, with a compiler of a few shell lines in the vendor's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from qaic_ray.compile.compiler import run_compiler
from qaic_ray.compile.store import BuildRequest, build
from qaic_ray.compile.variant import Precision, Source, Variant
from qaic_ray.contract import Specializations
from qaic_ray.errors import CompileError
from qaic_ray.folders import CACHE_VARIABLE
from qaic_ray.sdk import Sdk, open_sdk

GOOD = r"""
for arg in "$@"; do case $arg in -aic-binary-dir=*) out=${arg#*=};; esac; done
echo run >> "$(dirname "$0")/runs"
mkdir -p "$out"
printf '\x7c\xcd\xa1\0\0\1\1\0\x1c\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0rest' > "$out/programqpc.bin"
"""


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def make_sdk(root: Path, script: str) -> Sdk:
    (root / "exec").mkdir(parents=True, exist_ok=True)
    (root / "versions").mkdir(exist_ok=True)
    (root / "versions" / "apps.xml").write_text(
        "<versions><ci_build><base_version>1.20</base_version></ci_build></versions>"
    )
    compiler = root / "exec" / "qaic-exec"
    compiler.write_text("#!/bin/bash\n" + script)
    compiler.chmod(0o755)
    return open_sdk(root)


def request(tmp_path: Path, script: str = GOOD) -> BuildRequest:
    source = Source("m-kv", tmp_path / "m.onnx", None, "d" * 64)
    shapes = Specializations.build(batch_size=1, prompt_len=32, ctx_len=128, continuous=False)
    variant = Variant(source, Precision.FP32, 14, shapes)
    return BuildRequest(variant, make_sdk(tmp_path / "sdk", script), tmp_path / "qpc")


def runs(wanted: BuildRequest) -> int:
    file = wanted.sdk.root / "exec" / "runs"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_built_once_then_kept(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    first, second = build(wanted), build(wanted)
    assert (first.reused, second.reused, runs(wanted)) == (False, True, 1)
    assert first.path == tmp_path / "qpc" / "m-kv-32pl-128cl-14c-1BS-fp32"
    assert sorted(p.name for p in first.path.iterdir()) == [
        "compile.log", "programqpc.bin", "specializations.json", "variant.json"
    ]  # fmt: skip


def test_changed_model_is_compiled_again(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    build(wanted)
    source = replace(wanted.variant.source, digest="e" * 64)
    changed = replace(wanted, variant=replace(wanted.variant, source=source))
    assert not build(changed).reused
    assert runs(wanted) == 2


def test_many_at_once_compile_once(tmp_path: Path) -> None:
    wanted = request(tmp_path, "sleep 0.2" + GOOD)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(build, [wanted] * 8))
    assert runs(wanted) == 1
    assert sum(not r.reused for r in results) == 1


def test_failing_compiler_s_words_and_code_come_back_and_nothing_is_left(tmp_path: Path) -> None:
    wanted = request(tmp_path, 'echo "Invalid option -retained-state." >&2; exit 255')
    with pytest.raises(CompileError, match="exit code 255: Invalid option") as caught:
        build(wanted)
    assert caught.value.exit_code == 255
    assert list((tmp_path / "qpc").iterdir()) == []


def test_compiler_that_exits_zero_without_a_qpc_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"left no programqpc\.bin"):
        build(request(tmp_path, "exit 0"))
    assert list((tmp_path / "qpc").iterdir()) == []


def test_file_that_is_not_a_qpc_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="is not a QPC"):
        build(request(tmp_path, GOOD.replace("x7c", "x7d")))


def test_stale_result_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    old = build(wanted)
    source = replace(wanted.variant.source, digest="e" * 64)
    changed = replace(wanted, variant=replace(wanted.variant, source=source))
    make_sdk(wanted.sdk.root, "exit 1")
    with pytest.raises(CompileError):
        build(changed)
    assert (old.path / "programqpc.bin").is_file()


def test_killed_build_leaves_nothing_and_the_next_one_is_whole(tmp_path: Path) -> None:
    wanted = request(tmp_path, "touch started-here; mkdir started; sleep 60")
    code = (
        "import pickle, sys; from pathlib import Path; from qaic_ray.compile.store import *\n"
        "from qaic_ray.compile.variant import *; from qaic_ray.contract import *\n"
        "from qaic_ray.sdk import open_sdk\n"
        "tmp = Path(sys.argv[1])\n"
        "shapes = Specializations.build("
        "batch_size=1, prompt_len=32, ctx_len=128, continuous=False)\n"
        "source = Source('m-kv', tmp / 'm.onnx', None, 'd' * 64)\n"
        "build(BuildRequest(Variant(source, Precision.FP32, 14, shapes),"
        " open_sdk(tmp / 'sdk'), tmp / 'qpc'))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, start_new_session=True
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline, "the compiler never started"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "qpc" / wanted.variant.name).exists()

    make_sdk(wanted.sdk.root, GOOD)
    result = build(wanted)
    assert not result.reused
    assert [p.name for p in (tmp_path / "qpc").iterdir()] == [wanted.variant.name]


def test_compiler_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = tmp_path / "child"
    script = f"sleep 60 & echo $! > {child}; wait"
    with pytest.raises(CompileError, match="stopped after"):
        run_compiler(["/bin/sh", "-c", script], log, timeout_s=0.3)
    pid = int(child.read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists():
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # dead; whoever is init here has not looked yet
            break
        assert time.monotonic() < deadline, "the compiler's child lives on"
        time.sleep(0.01)


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="Cannot start the compiler /nowhere/qaic-exec"):
        run_compiler(["/nowhere/qaic-exec"], tmp_path / "log")
