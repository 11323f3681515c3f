"""Builds by content, with a compiler of a few shell lines in the vendor's place."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import awaited
import pytest

from qaic_ray.compile.compiler import Source, Variant, run_compiler
from qaic_ray.compile.store import BuildRequest, build, check_kept, check_request, content_key
from qaic_ray.contract import Specializations
from qaic_ray.errors import CompileError, UsageError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.option_types import Layout, Precision
from qaic_ray.sdk import Sdk, open_sdk
from qaic_ray.timeouts import Timeouts

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
        "from qaic_ray.compile.compiler import *; from qaic_ray.contract import *\n"
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
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline, "the compiler never started"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    awaited.ended(process)
    assert not (tmp_path / "qpc" / wanted.variant.name).exists()

    make_sdk(wanted.sdk.root, GOOD)
    result = build(wanted)
    assert not result.reused
    assert [p.name for p in (tmp_path / "qpc").iterdir()] == [wanted.variant.name]


def damaged(wanted: BuildRequest, name: str, content: bytes | None) -> Path:
    """The built folder with one file that is not what it was."""
    folder = build(wanted).path
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return folder


HEADER = bytes.fromhex("7ccda100 00010100 1c00000000000000 0000000000000000")
DAMAGES = [
    ("programqpc.bin", HEADER),  # short
    ("programqpc.bin", HEADER + b"best"),  # another of the same length
    ("programqpc.bin", b"\0" * 28),
    ("programqpc.bin", b""),
    ("programqpc.bin", None),
    ("specializations.json", b"{}"),
    ("variant.json", b"[]"),
    ("variant.json", b"null"),
    ("variant.json", b'"x"'),
    ("variant.json", b"{"),
    ("variant.json", b"\xff"),
    ("variant.json", None),
]


@pytest.mark.parametrize(("name", "content"), DAMAGES)
def test_what_is_not_what_was_built_is_built_again(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    wanted = request(tmp_path)
    folder = damaged(wanted, name, content)
    again = build(wanted)
    assert (again.reused, again.path, runs(wanted)) == (False, folder, 2)
    assert build(wanted).reused
    assert (folder / "programqpc.bin").read_bytes() == HEADER + b"rest"


def test_a_log_that_is_gone_is_not_missed(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    damaged(wanted, "compile.log", None)
    assert build(wanted).reused


@pytest.mark.parametrize(("name", "content"), DAMAGES[:5])
def test_a_broken_program_is_not_run(tmp_path: Path, name: str, content: bytes | None) -> None:
    wanted = request(tmp_path)
    check_kept(build(wanted).path)
    with pytest.raises(UsageError, match=r"programqpc\.bin") as caught:
        check_kept(damaged(wanted, name, content))
    assert "compile" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_copy_is_read_through_once_and_is_the_same_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(tmp_path)
    built = build(wanted).path
    copy = tmp_path / "elsewhere" / built.name
    shutil.copytree(built, copy)
    digest = hashlib.sha256(HEADER + b"rest").hexdigest()
    assert content_key(built) == content_key(copy) == digest
    check_kept(copy)
    assert build(replace(wanted, store=copy.parent)).reused

    def not_again(path: Path) -> str:
        pytest.fail(f"{path} is read again")

    monkeypatch.setattr("qaic_ray.files.folders.sha256_of", not_again)
    monkeypatch.setattr("qaic_ray.compile.store.sha256_of", not_again)
    assert build(replace(wanted, store=copy.parent)).reused
    assert content_key(copy) == digest


def test_the_content_is_the_program_s_whatever_variant_json_is_made_to_say(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    built = build(wanted).path
    said = json.loads((built / "variant.json").read_text())
    digest = said["files"][0]["sha256"]
    said["files"][0]["sha256"] = "0" * 64
    (built / "variant.json").write_text(json.dumps(said))
    assert content_key(built) == digest
    (built / "variant.json").unlink()
    assert content_key(built) == digest
    assert not build(wanted).reused


def test_what_an_older_version_compiled_is_kept_and_remembered(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    built = build(wanted).path
    path = built / "variant.json"
    said = json.loads(path.read_text())
    del said["files"], said["seal"]
    path.write_text(json.dumps(said))
    (built / "notes.txt").touch()
    assert build(wanted).reused
    assert {file["name"] for file in json.loads(path.read_text())["files"]} == {
        "programqpc.bin", "specializations.json"
    }  # fmt: skip
    check_kept(built)


@pytest.mark.parametrize(
    "content", [["notes.txt"], ["programqpc.bin"], ["variant.json", "notes.txt"], ["deep/"]]
)
def test_a_folder_that_is_not_ours_is_refused_before_anything_and_stays(
    tmp_path: Path, content: list[str]
) -> None:
    wanted = request(tmp_path)
    wanted.target.mkdir(parents=True)
    for name in content:
        if name.endswith("/"):
            (wanted.target / name).mkdir()
        else:
            (wanted.target / name).write_text("mine")
    for attempt in (check_request, build):
        with pytest.raises(UsageError, match=f"not compiled there .*{content[-1]}"):
            attempt(wanted)
    assert {path.name for path in wanted.target.iterdir()} == {n.rstrip("/") for n in content}
    assert runs(wanted) == 0


def test_a_folder_with_notes_is_kept_while_it_is_current_and_then_refused(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    folder = build(wanted).path
    (folder / "notes.txt").write_text("mine")
    check_request(wanted)
    assert build(wanted).reused
    (folder / "programqpc.bin").unlink()
    with pytest.raises(UsageError, match=r"'notes\.txt'"):
        build(wanted)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_link_of_the_variant_s_name_is_read_and_never_replaced(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    folder = build(wanted).path
    moved = folder.rename(tmp_path / "moved")
    folder.symlink_to(moved)
    assert build(wanted).reused
    (moved / "programqpc.bin").unlink()
    with pytest.raises(UsageError, match="is not a folder"):
        build(wanted)
    assert (moved / "variant.json").is_file()


def test_a_store_that_may_only_be_read_is_reused(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    built = build(wanted)
    shutil.copytree(built.path, tmp_path / "shared" / built.name)
    shared = replace(wanted, store=tmp_path / "shared")

    def refuse(*_: object) -> None:
        raise UsageError("Read-only file system")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qaic_ray.compile.store.locked", refuse)
        assert build(shared).reused


OTHER_BUILDER = """
import pickle, sys
from qaic_ray.compile.store import build
wanted = pickle.loads(bytes.fromhex(sys.argv[1]))
print(build(wanted).reused)
"""


def test_builders_of_other_caches_and_paths_compile_once(tmp_path: Path) -> None:
    wanted = request(tmp_path, "sleep 0.5" + GOOD)
    (tmp_path / "alias").symlink_to(tmp_path)
    builders = []
    for number, store in enumerate((tmp_path / "qpc", tmp_path / "alias" / "qpc") * 2):
        argument = pickle.dumps(replace(wanted, store=store)).hex()
        environment = os.environ | {CACHE_VARIABLE: str(tmp_path / f"cache{number}")}
        command = [sys.executable, "-c", OTHER_BUILDER, argument]
        builders.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    said = [awaited.said(builder)[0].strip() for builder in builders]
    assert sorted(said) == ["False", "True", "True", "True"]
    assert runs(wanted) == 1


def test_compiler_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = tmp_path / "child"
    script = f"sleep 60 & echo $! > {child}; wait"
    with pytest.raises(CompileError, match="stopped after"):
        run_compiler(["/bin/sh", "-c", script], log, timeouts=Timeouts(compile_s=0.3))
    await_end(int(child.read_text()))


def await_end(pid: int) -> None:
    """Wait until a process is gone; whoever is init here may not have looked yet."""
    deadline = time.monotonic() + 120
    # A process may end between any two looks at it.
    with suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, f"process {pid} lives on"
            time.sleep(0.01)


CALLER = """
import signal, sys
from pathlib import Path
from qaic_ray.compile.compiler import run_compiler
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits none
run_compiler(["/bin/bash", "-c", sys.argv[1]], Path("log"))
"""
# The compiler, a child of it, and one that begins a session of its own.
FAMILY = "sleep 600 & echo $! >> pids; setsid sleep 600 & echo $! >> pids; echo $$ >> pids; wait"


def family(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process that has a compiler run, and the processes of that."""
    caller = subprocess.Popen([sys.executable, "-c", CALLER, FAMILY], cwd=folder)
    deadline = time.monotonic() + 120
    while len(pids := _lines(folder / "pids")) < 3:
        assert time.monotonic() < deadline, "the compiler never started"
        time.sleep(0.01)
    return caller, [int(pid) for pid in pids]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_compiler_outlives_its_caller(
    tmp_path: Path, how: signal.Signals, is_stopped: bool
) -> None:
    caller, pids = family(tmp_path)
    if is_stopped:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    os.kill(caller.pid, how)
    awaited.ended(caller)
    for pid in pids:
        await_end(pid)


def test_a_compiler_does_not_outlive_its_guard_either(tmp_path: Path) -> None:
    caller, pids = family(tmp_path)
    guard = int(Path(f"/proc/{pids[-1]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(guard, signal.SIGKILL)
    assert awaited.ended(caller) == 1  # it says that the compiler ended with -9
    for pid in (pids[0], pids[2]):  # one in a session of its own is not seen any more
        await_end(pid)
    os.kill(pids[1], signal.SIGKILL)


def test_what_a_compiler_leaves_running_ends_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"(setsid sleep 600 & echo $! > {pids})"
    run_compiler(["/bin/bash", "-c", script], tmp_path / "log")
    await_end(int(pids.read_text()))


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -SEGV $$", -signal.SIGSEGV)])
def test_a_compiler_s_end_is_told_as_it_was(tmp_path: Path, script: str, code: int) -> None:
    with pytest.raises(CompileError) as caught:
        run_compiler(["/bin/bash", "-c", script], tmp_path / "log")
    assert caught.value.exit_code == code


def test_exit_127_is_the_compiler_s_own(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"exit code 127.*no-such-tool"):
        run_compiler(["/bin/bash", "-c", "no-such-tool"], tmp_path / "log")


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="Cannot start the compiler /nowhere/qaic-exec"):
        run_compiler(["/nowhere/qaic-exec"], tmp_path / "log")


def compilation_dims(qpc: Path) -> tuple[int, int, int | None]:
    """What QEfficient's commands do with the folder that they are given, 1.18 to 1.23."""
    assert (qpc / "programqpc.bin").is_file()
    above = os.path.dirname(os.path.normpath(qpc))
    first = json.loads(Path(above, "specializations.json").read_text())["specializations"][0]
    first = first.get("symbols", first)
    slots = first.get("full_batch_size")
    sizes = int(first["batch_size"]), int(first["ctx_len"])
    return (*sizes, None if slots is None else int(slots))


@pytest.mark.parametrize("slots", [None, 4])
def test_qefficients_layout_is_the_same_program_below_its_specializations(
    tmp_path: Path, slots: int | None
) -> None:
    plain = request(tmp_path)
    shapes = Specializations.build(
        batch_size=slots or 1, prompt_len=32, ctx_len=128, continuous=slots is not None
    )
    custom_io = tmp_path / "io.yaml"
    custom_io.write_text(" - IOName: past_key.0\n   Precision: float16\n")
    source = replace(plain.variant.source, custom_io=custom_io)
    plain = replace(plain, variant=replace(plain.variant, specializations=shapes, source=source))
    first = build(plain)
    laid = replace(plain, layout=Layout.QEFFICIENT)
    for _ in range(2):  # the program that is there, and the layout that is there
        again = build(laid)
        assert (again.reused, again.qpc_bytes) == (True, first.qpc_bytes)
        assert compilation_dims(again.path / "qpc") == (1, 128, slots)
        assert (again.path / "custom_io.yaml").read_bytes() == custom_io.read_bytes()
    program = first.path / "programqpc.bin"
    assert (first.path / "qpc" / "programqpc.bin").samefile(program)
    assert build(plain).reused
    check_kept(first.path / "qpc")
    # Compiled anew, it has no leftover of the other layout, and gets the new program.
    source = replace(source, digest="e" * 64)
    changed = replace(plain, variant=replace(plain.variant, source=source))
    assert not build(changed).reused
    assert not (first.path / "qpc").exists()
    build(replace(changed, layout=Layout.QEFFICIENT))
    assert (first.path / "qpc" / "programqpc.bin").samefile(program)


def test_a_stale_second_name_is_renewed(tmp_path: Path) -> None:
    laid = replace(request(tmp_path), layout=Layout.QEFFICIENT)
    second = build(laid).path / "qpc" / "programqpc.bin"
    second.unlink()
    second.write_bytes(b"an older program")
    build(laid)
    assert second.read_bytes() == (second.parent.parent / "programqpc.bin").read_bytes()
