"""The installed folder: its layout, its commands from anywhere, and what it never touches."""

from __future__ import annotations

import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from awaited import said

import qaic_ray.emulator
from qaic_ray.emulator import folder
from qaic_ray.emulator import install as installer
from qaic_ray.emulator.install import APPS_VERSIONS, InstallError, install

PACKAGE = Path(str(qaic_ray.emulator.__file__)).parent
LIBRARY = f"dev/lib/{platform.machine()}"
COMMANDS = {
    "exec/qaic-exec",
    "exec/qaic-runner",
    "exec/qaic-api-test",
    "exec/qaic-opstats",
    "tools/qaic-util",
    "tools/qaic-qpc",
    "tools/qaic-device-partition",
    "tools/qaic-dev-partition",
    "tools/qaic-version-util",
    "scripts/qaic-model-configurator/model_configurator.py",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user's environment that knows nothing of qaic_ray."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return {**kept, folder.STATE_VARIABLE: str(tmp_path / "state")}


def files(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and PACKAGE.name not in path.parts and path.suffix != ".pyc"
    }


@pytest.mark.parametrize("version", APPS_VERSIONS)
def test_layout_by_version(version: str, tmp_path: Path) -> None:
    root = tmp_path / "qti-aic"
    assert install(root, apps_version=version, cards=2, sku="pro")
    expected = COMMANDS | {
        "dev/python/QAicApi_pb2.py",
        f"{LIBRARY}/qaicrt.py",
        f"{LIBRARY}/qaic.py",
        f"{LIBRARY}/qaic-0.0.1-py3-none-any.whl",
        "versions/apps.xml",
        "versions/platform.xml",
        folder.MARKER,
    }
    if version in {"1.21.6", "1.22"}:
        expected.add("exec/qaic-compile")
    found = {name for name in files(root) if "qaic_emulated_sdk" not in name}
    assert found == expected
    for command in (*COMMANDS, *(expected & {"exec/qaic-compile"})):
        assert (root / command).stat().st_mode & 0o777 == 0o755
    for name in ("apps.xml", "platform.xml"):
        element = ElementTree.parse(root / "versions" / name).getroot().find(".//base_version")
        assert element is not None
        assert element.text == version
    copied = root / LIBRARY / "qaic_emulated_sdk"
    assert {path.relative_to(copied) for path in copied.rglob("*.py")} == {
        path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")
    }
    messages = (PACKAGE / "container/aicapi.py").read_bytes()
    assert (root / "dev/python/QAicApi_pb2.py").read_bytes() == messages
    marker = json.loads((root / folder.MARKER).read_text())
    assert marker["apps_version"] == version
    assert (marker["cards"], marker["sku"]) == (2, "pro")
    assert len(list(tmp_path.iterdir())) == 1


def test_the_same_again_does_nothing_and_another_replaces(tmp_path: Path) -> None:
    root = tmp_path / "sdk"
    assert install(root)
    inode = root.stat().st_ino
    assert not install(root)
    assert root.stat().st_ino == inode
    assert install(root, cards=8)
    assert json.loads((root / folder.MARKER).read_text())["cards"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["sdk"]


def test_replacing_works_where_folders_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldLibrary:
        pass

    monkeypatch.setattr(installer.ctypes, "CDLL", lambda *_, **__: OldLibrary())
    root = tmp_path / "sdk"
    install(root)
    assert install(root, cards=8)
    assert json.loads((root / folder.MARKER).read_text())["cards"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["sdk"]


def test_a_folder_of_an_earlier_version_is_replaced_whole(tmp_path: Path) -> None:
    root = tmp_path / "sdk"
    install(root)
    package = root / LIBRARY / "qaic_emulated_sdk"
    shutil.rmtree(package)
    package.mkdir()
    for name in ("__init__.py", "card.py", "util.py"):  # as it was before it had folders
        (package / name).write_text("raise SystemExit('old')")
    marker = root / folder.MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "digest": "old"}))
    assert install(root)
    assert {path.name for path in package.glob("*.py")} == {
        path.name for path in PACKAGE.glob("*.py")
    }
    assert not install(root)
    output = subprocess.run([str(root / "tools/qaic-util"), "-q"], check=True, capture_output=True)
    assert b"Number of devices: 4" in output.stdout


def test_an_empty_folder_is_taken_and_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert install(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / folder.MARKER).is_file()


@pytest.mark.parametrize(
    "content", [{"notes.txt": "mine"}, {folder.MARKER: "{"}, {folder.MARKER: '{"a": 1}'}]
)
def test_what_is_not_ours_is_refused_in_one_sentence(
    content: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "theirs"
    root.mkdir()
    for name, text in content.items():
        (root / name).write_text(text)
    assert installer.main([str(root)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {root} was not made by this tool")
    assert files(root) == set(content)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_folder_of_ours_that_somebody_has_put_something_into_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "sdk"
    install(root)
    subprocess.run([str(root / "tools/qaic-util"), "-q"], check=True, capture_output=True)
    assert install(root, cards=2)  # what running it has left is ours too
    (root / "tools" / "mine.sh").write_text("precious")
    (root / "dev" / "home").symlink_to(tmp_path)
    before = files(root)
    assert installer.main([str(root)]) == 2
    assert "did not put there (dev/home, tools/mine.sh)" in capsys.readouterr().err
    assert files(root) == before


def test_a_name_of_all_that_a_folder_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def laid(**what: Any) -> Path:
        return installer.install_under(tmp_path, **what)

    first = laid()
    assert laid() == first
    others = {laid(cards=2), laid(sku="pro"), laid(apps_version="1.17")}
    sources = installer._sources()
    monkeypatch.setattr(installer, "_sources", lambda: {**sources, "card.py": b"# another version"})
    inode = first.stat().st_ino
    assert len({first, laid(), *others}) == 5
    assert first.stat().st_ino == inode  # whoever uses it goes on with it
    assert json.loads((first / folder.MARKER).read_text())["digest"][:12] in first.name


def test_impossible_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path / "file", "is a file"), (Path("/proc/sdk"), "cannot write")):
        assert installer.main([str(path)]) == 2
        assert message in capsys.readouterr().err
    for wrong in ({"apps_version": "0.9"}, {"cards": 0}, {"cards": 65}, {"sku": "lite"}):
        with pytest.raises(InstallError):
            install(tmp_path / "sdk", **wrong)
    assert not (tmp_path / "sdk").exists()


def test_concurrent_installs_of_one_prefix(tmp_path: Path) -> None:
    root = tmp_path / "sdk"
    command = [sys.executable, "-m", "qaic_ray.emulator.install", str(root), "--cards"]
    processes = [
        subprocess.Popen([*command, str(2 + number % 2)], stdout=subprocess.PIPE, text=True)
        for number in range(8)
    ]
    for process in processes:
        said(process)
    assert [process.returncode for process in processes] == [0] * 8
    assert json.loads((root / folder.MARKER).read_text())["cards"] in {2, 3}
    assert (root / LIBRARY / "qaicrt.py").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["sdk"]


USER = """
import sys, platform
root = sys.argv[1]
sys.path.append(f"{root}/dev/lib/{platform.machine()}")
import qaicrt
sys.path.append(f"{root}/dev/python")
import QAicApi_pb2 as aicapi
assert "qaic_ray" not in sys.modules
assert "onnxruntime" not in sys.modules
print(qaicrt.Util().getDeviceIds()[1], aicapi.IoDesc().ByteSize())
print([n for n in dir(qaicrt.QAicProgramProperties()) if not n.startswith("_")])
"""


def run(
    command: list[str], environment: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, check=True, timeout=120
    )


def test_a_program_uses_it_without_qaic_ray_from_another_place(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    install(tmp_path / "first", cards=2, apps_version="1.22")
    moved = tmp_path / "with space" / "moved"
    moved.parent.mkdir()
    shutil.move(tmp_path / "first", moved)
    script = tmp_path / "user.py"
    script.write_text(USER)
    # A trap: names of our modules in the user's folder must not be taken for ours.
    for name in ("card.py", "folder.py", "util.py", "timing.py", "numpy.py"):
        (tmp_path / "cwd").mkdir(exist_ok=True)
        (tmp_path / "cwd" / name).write_text("raise SystemExit('wrong module')")
    cwd = tmp_path / "cwd"
    lines = run([sys.executable, str(script), str(moved)], environment, cwd).stdout.splitlines()
    assert lines[0] == "QIDList[0, 1] 0"
    assert "dataPathTimeoutMs" in lines[1]
    assert "SubmitRetryTimeoutMs" not in lines[1]
    text = run([str(moved / "tools" / "qaic-util"), "-q"], environment, cwd).stdout
    assert "Number of devices: 2" in text
    (tmp_path / "bin").symlink_to(moved / "tools")
    linked = str(tmp_path / "bin" / "qaic-util")
    assert "Number of devices: 2" in run([linked, "-q"], environment, cwd).stdout


def test_two_folders_live_in_one_process(tmp_path: Path, environment: dict[str, str]) -> None:
    for name, cards in (("a", 1), ("b", 3)):
        install(tmp_path / name, cards=cards)
    script = f"""
import importlib.util
for root in ({str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}):
    path = root + "/{LIBRARY}/qaicrt.py"
    spec = importlib.util.spec_from_file_location("qaicrt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(len(module.Util().getDeviceIds()[1]))
"""
    environment.pop(folder.STATE_VARIABLE)
    environment["TMPDIR"] = str(tmp_path)
    result = run([sys.executable, "-c", script], environment, tmp_path)
    assert result.stdout.split() == ["1", "3"]


def test_the_interpreter_can_be_named(tmp_path: Path, environment: dict[str, str]) -> None:
    install(tmp_path / "sdk")
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "chosen"\n')
    fake.chmod(0o755)
    environment[installer.PYTHON_VARIABLE] = str(fake)
    assert run([str(tmp_path / "sdk/tools/qaic-util")], environment, tmp_path).stdout == "chosen\n"


def test_state_is_private_and_not_taken_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(folder.STATE_VARIABLE, raising=False)
    monkeypatch.setattr(folder.tempfile, "gettempdir", lambda: str(tmp_path))
    first = folder.Folder(tmp_path / "a", "1.20", 1, "standard").state_dir()
    second = folder.Folder(tmp_path / "b", "1.20", 1, "standard").state_dir()
    assert first != second
    assert first.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(first)
    first.symlink_to(second)
    with pytest.raises(folder.FolderError, match="belongs to someone else"):
        folder.Folder(tmp_path / "a", "1.20", 1, "standard").state_dir()


def test_a_damaged_marker_and_no_folder_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(folder.ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(folder.FolderError, match="no emulated SDK folder"):
        folder.current()
    (tmp_path / folder.MARKER).write_text('{"cards": 1}')
    with pytest.raises(folder.FolderError, match="is damaged"):
        folder.current()


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_sources_parse_on_python_3_8_and_import_relatively(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("qaic_ray") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert not (node.module or "").startswith("qaic_ray")
