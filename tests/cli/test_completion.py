"""What bash offers for a word, asked as bash asks; and how it is switched on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qaic_ray.cli.commands import app
from qaic_ray.shipped.jobs import shipped_jobs

QAIC_RAY = Path(sys.executable).with_name("qaic-ray")
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_qaic_ray_completion qaic-ray
printf '%s\\n' "${COMPREPLY[@]}"
"""
HEAVY = {"ray", "torch", "onnxruntime", "onnx", "transformers", "numpy"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home, and in it a folder with jobs and runs."""
    home = tmp_path_factory.mktemp("home")
    (home / "jobs").mkdir()
    for name in ("chat.yaml", "long.yaml", "README.md"):
        (home / "jobs" / name).touch()
    for run in ("runs/first-1", "runs/second-2", "elsewhere/third-3"):
        (home / run).mkdir(parents=True)
        (home / run / "request.yaml").touch()
    (home / "runs" / "no-run").mkdir()
    (home / "hub" / "models--meta-llama--Llama-3.2-1B").mkdir(parents=True)
    return home


def environment(home: Path) -> dict[str, str]:
    path = f"{QAIC_RAY.parent}:/usr/bin:/bin"
    return {"PATH": path, "HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}


@pytest.fixture(scope="module")
def script(home: Path) -> Path:
    """As `--show-completion` prints it to a bash that asks."""
    path = home / "completion.sh"
    shown = subprocess.run(
        ["bash", "-c", "qaic-ray --show-completion; exit"], env=environment(home),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    path.write_text(shown.stdout)
    return path


OFFERED: dict[str, list[str]] = {
    "ru": ["run", "runs"],
    "emulator ": ["install", "run"],
    "run --sa": ["--sample", "--sample-seed"],
    # A name that is only taken is offered where no other begins so.
    "run --generation": ["--generation-len"],
    "run --model": ["--model"],
    "status --": ["--watch", "--address", "--output", "--json", "--help"],
    "run --stream ": ["auto", "rows", "ordered", "tokens"],
    "run --log-format=j": ["json"],
    "compile m ": ["fp16", "mx6", "fp32"],
    "run ": ["smollm2-135m", "meta-llama/Llama-3.2-1B"],
    "export -m meta": ["meta-llama/Llama-3.2-1B"],
    "launch ": ["jobs/chat.yaml", "jobs/long.yaml", *shipped_jobs()],
    "launch s": ["serve", "smollm2", "start"],
    "plan jobs/l": ["jobs/long.yaml"],
    "report ": ["second-2", "first-1"],
    "report runs/f": ["runs/first-1"],
    "run --resume ": ["runs/second-2", "runs/first-1"],
    "status -o elsewhere ": ["third-3"],
    "run m -i ": [],  # bash offers files then
    "run m --output r": [],
}


@pytest.mark.parametrize("words", OFFERED)
def test_a_word_is_offered(
    words: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked as the script for bash asks, of a program that is loaded."""
    monkeypatch.chdir(home)
    line = ["qaic-ray", *words.split(" ")]
    asked = {"COMP_WORDS": "\n".join(line), "COMP_CWORD": str(len(line) - 1)}
    asked["_QAIC_RAY_COMPLETE"] = "complete_bash"
    for name, value in (environment(home) | asked).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        app(prog_name="qaic-ray")
    assert ended.value.code == 0
    assert [word for word in capsys.readouterr().out.splitlines() if word] == OFFERED[words]


@pytest.mark.parametrize("words", ["emulator ", "run ", "run --log-format=j", "run m -i "])
def test_bash_offers(words: str, home: Path, script: Path) -> None:
    line = ["qaic-ray", *words.split(" ")]
    asked = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", str(script), *line], cwd=home,
        env=environment(home), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert asked.stderr == ""
    assert [word for word in asked.stdout.splitlines() if word] == OFFERED[words]


def test_files_are_completed_where_nothing_is_offered(script: Path) -> None:
    assert "complete -o default -F _qaic_ray_completion qaic-ray" in script.read_text()


def test_no_name_with_underscores_is_offered(home: Path) -> None:
    asked = environment(home) | {"COMP_WORDS": "qaic-ray run --", "COMP_CWORD": "2"}
    asked["_QAIC_RAY_COMPLETE"] = "complete_bash"
    done = subprocess.run([QAIC_RAY], env=asked, capture_output=True, text=True, check=True)
    offered = done.stdout.split()
    assert "--device-id" in offered
    assert not [word for word in offered if "_" in word]
    assert not {"--text", "--model-name", "--devices"} & set(offered)


def test_a_completion_loads_nothing_heavy(home: Path) -> None:
    program = (
        "import json, sys\nfrom qaic_ray.cli import main\nsys.argv = ['qaic-ray']\n"
        "try: main()\nexcept SystemExit: pass\nprint(json.dumps(sorted(sys.modules)))"
    )
    asked = environment(home) | {"COMP_WORDS": "qaic-ray run --sa", "COMP_CWORD": "2"}
    asked |= {"_QAIC_RAY_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=asked, capture_output=True, text=True, check=True
    )
    *offered, modules = done.stdout.splitlines()
    assert offered == ["--sample", "--sample-seed"]
    assert HEAVY.isdisjoint(name.partition(".")[0] for name in json.loads(modules))


@pytest.mark.parametrize(
    ("shell", "words"), [("zsh", "#compdef qaic-ray"), ("fish", "complete --command qaic-ray")]
)
def test_other_shells_have_a_script(shell: str, words: str, home: Path) -> None:
    asked = environment(home) | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [QAIC_RAY, "--show-completion", shell], env=asked, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert words in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)


def test_it_is_installed_only_when_asked_for(tmp_path: Path) -> None:
    subprocess.run(
        ["bash", "-c", "qaic-ray --version; exit"], env=environment(tmp_path), check=True,
        capture_output=True,
    )  # fmt: skip
    assert os.listdir(tmp_path) == []
    done = subprocess.run(
        ["bash", "-c", "qaic-ray --install-completion; exit"], env=environment(tmp_path),
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "bash completion installed in" in done.stdout
    assert "qaic-ray.sh" in (tmp_path / ".bashrc").read_text()
