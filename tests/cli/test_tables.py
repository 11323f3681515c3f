"""What people see of runs, rows and machines, at three widths: recorded frames, which were read.

`QAIC_RAY_RECORD=1 pytest tests/cli/test_tables.py` writes them anew, to be read again.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from awaited import ended
from rich.console import Console, RenderableType

from qaic_ray.cli import main, tables
from qaic_ray.doctor.facts import Finding, Verdict
from qaic_ray.inspect.row_history import RowRecord
from qaic_ray.inspect.run_status import RunStatus
from qaic_ray.pipeline.looking import Statuses
from qaic_ray.pipeline.row_view import Rendering, RowView
from qaic_ray.pipeline.submit_step import JobStatus
from qaic_ray.rows import FinishReason, Prompt, Row

FRAMES = Path(__file__).with_name("frames")
WIDTHS = (60, 80, 160)
BEGAN_S = 1_767_225_600.0  # 2026-01-01 00:00 UTC
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def running() -> RunStatus:
    return RunStatus(
        folder="/data/runs/smollm2-20260101-000000",
        job="smollm2",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        qpc="/data/qpc/smollm2-kv-32pl-512cl-14c-8BS-mx6",
        state="running",
        rows=4_210,
        failed_rows=3,
        total_rows=20_000,
        generated_tokens=512_345,
        seconds=904.0,
        tokens_per_s=566.75,
        eta_s=3391.4,
        started_s=BEGAN_S,
        last_row_s=BEGAN_S + 904,
        sessions=1,
        pid=4711,
    )


def statuses() -> Statuses:
    runs = [
        running(),
        RunStatus(
            folder="/data/runs/run-20251231-101112",
            state="unfinished",
            rows=48,
            generated_tokens=2880,
            seconds=5.4,
            tokens_per_s=533.0,
            started_s=BEGAN_S - 50_000,
            sessions=2,
            problem="/data/runs/run-20251231-101112/journal/000001.jsonl is damaged at line 7.",
        ),
        RunStatus(
            folder="/data/runs/run-20251230-101112",
            state="done",
            rows=300,
            total_rows=300,
            failed_rows=0,
            generated_tokens=18_000,
            seconds=32.4,
            tokens_per_s=555.0,
            started_s=BEGAN_S - 150_000,
        ),
    ]
    jobs = [
        JobStatus(
            "nightly-summaries-20251231-230000-ab12", "nightly-summaries", "failed",
            BEGAN_S - 3600, BEGAN_S - 3000, 12, 12, None,
            "The Platform SDK's driver is not loaded on node 10.0.0.7: run `sudo modprobe qaic`.",
        ),
    ]  # fmt: skip
    return Statuses(runs, jobs, hidden=83)


def findings() -> list[Finding]:
    where = "dl2q-17"
    return [
        Finding("SDK", Verdict.OK, "real SDK 1.20.2 at /opt/qti-aic", "", where),
        Finding(
            "Python",
            Verdict.FAIL,
            "Python 3.11.7 runs here, and qaicrt of this SDK is for Python 3.8 or 3.10.",
            "Install qaic-ray with Python 3.8 or 3.10, or an SDK whose qaicrt is for 3.11: "
            "python3.8 -m venv .venv.",
            where,
        ),
        Finding(
            "driver time-outs",
            Verdict.WARN,
            "control_resp_timeout_s is 60: too short for loading a large program of a language "
            "model.",
            "Run `echo 250 | sudo tee /sys/module/qaic/parameters/control_resp_timeout_s`.",
            where,
        ),
        Finding("clocks of all nodes", Verdict.OK, "less than 0.1 s apart"),
    ]


def view(*, failed: bool = False) -> RowView:
    prompt = Prompt(17, "Say [bold]hello[/] to everyone who reads this line of text.", "row-17")
    answer = Row(
        17, prompt.text, "Hello, everyone.\nGood to see you.", FinishReason.STOP, id=prompt.id,
        token_ids=tuple(range(1000, 1012)), prompt_tokens=23, ttft_s=0.1123, decode_s=0.8,
        worker="card 3", attempts=2, stop_reason="###",
    )  # fmt: skip
    lost = Row.failed(prompt, "card 1 was lost (SIGKILL).", worker="card 1", attempts=2)
    if failed:
        records = [RowRecord(lost, 1, 0, 3.0, is_final=False)]
        return RowView(Path("runs/a"), records, Rendering(remark="Cannot be rendered: no model."))
    records = [RowRecord(lost, 1, 0, 3.0, is_final=False), RowRecord(answer, 1, 1, 2.0, True)]
    text = "<|im_start|>user\nSay [bold]hello[/]<|im_end|>\n<|im_start|>assistant\n"
    return RowView(Path("runs/a"), records, Rendering(text, tuple(range(40, 63))))


DRAWN: dict[str, Callable[[int], RenderableType]] = {
    "status": lambda width: tables.status_table(statuses(), width),
    "runs": lambda width: tables.runs_table([r for r in statuses().runs if not r.problem], width),
    "doctor": lambda _: tables.findings_table(findings()),
    "row": lambda _: tables.row_lines(view()),
    "failed-row": lambda _: tables.row_lines(view(failed=True)),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", DRAWN)
def test_frames(name: str, width: int) -> None:
    out = Console(file=StringIO(), width=width, highlight=False)
    out.print(DRAWN[name](width))
    drawn = "".join(f"{line.rstrip()}\n" for line in out.file.getvalue().splitlines())  # type: ignore[attr-defined]
    frame = FRAMES / f"{name}-{width}.txt"
    if os.environ.get("QAIC_RAY_RECORD"):
        frame.write_text(drawn)
    assert drawn == frame.read_text()
    assert max(len(line) for line in drawn.splitlines()) <= width


def test_a_line_of_a_log_says_what_goes_on() -> None:
    assert tables.status_line(statuses()) == (
        "smollm2-20260101-000000: running, 4,210 of 20,000 rows, 3 failed, 566.8 tokens/s, "
        "ETA 0:56:31"
    )
    assert tables.status_line(Statuses([statuses().runs[2]], [])) == (
        "run-20251230-101112: done, 300 rows, 0 failed, 555.0 tokens/s"
    )
    assert tables.status_line(Statuses([], [])) == "nothing is running"


# -- the command, on a terminal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a run that is done, and one that is not."""
    from qaic_ray.runs.journal import Journal

    for name in ("run-20260101-000000", "run-20260102-000000"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "request.yaml").write_text("name: run\nmodel: m\nqpc: q\nprompt: a|b|c\n")
        with Journal(run, {"input": {}, "qpc": "q"}) as journal:
            journal.append(Row(0, "a", "b", FinishReason.STOP, token_ids=(1, 2)), 1, 1.0)
            journal.commit()
    report = {"rows": 3, "failed_rows": 1, "generated_tokens": 7, "seconds": 2.0}
    document = {**report, "tokens_per_s": 3.5, "goes_on": False}
    (run / "report.json").write_text(json.dumps(document))
    return tmp_path


def without_terminal() -> dict[str, str]:
    """The environment, without what says how wide a terminal is, and what it can do."""
    own = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM")
    return {name: value for name, value in os.environ.items() if name not in own}


def on_terminal(folder: Path, width: int, *words: str, **variables: str) -> str:
    """What a command writes to a terminal of so many columns."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    environment = {**without_terminal(), "TERM": "xterm-256color", **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", "from qaic_ray.cli import main; main()", *words],
        cwd=folder, env=environment, stdin=writer, stdout=writer, stderr=writer,
    )  # fmt: skip
    os.close(writer)
    written = b""
    while select.select([reader], [], [], 60)[0]:
        try:
            written += os.read(reader, 65536)
        except OSError:  # its other end is closed
            break
    ended(process)
    os.close(reader)
    return written.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("width", WIDTHS)
def test_status_is_as_wide_as_the_terminal(folder: Path, width: int) -> None:
    said = ESCAPE.sub("", on_terminal(folder, width, "status"))
    assert max(map(len, said.splitlines())) <= width
    assert "run-20260101-000000   unfinished   1 of 3" in said
    assert "run-20260102-000000   done              3" in said
    assert ("started" in said) is (width >= 80)


def test_without_colour(folder: Path) -> None:
    assert "\x1b[33munfinished" in on_terminal(folder, 80, "status")
    plain = on_terminal(folder, 80, "status", NO_COLOR="1")
    assert not re.search(r"\x1b\[3[0-9]m", plain)
    dumb = on_terminal(folder, 60, "status", TERM="dumb")
    assert "\x1b" not in dumb
    assert max(map(len, dumb.splitlines())) <= 60


def test_watch_redraws_and_ends_with_the_run(folder: Path) -> None:
    run = "run-20260101-000000"
    said = on_terminal(folder, 80, "status", run, "--watch")
    assert "\x1b[?25l" in said  # drawn in place
    assert "unfinished" in said
    dumb = on_terminal(folder, 80, "status", run, "--watch", TERM="dumb")
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {run}: unfinished, 1 of 3 rows, 0 failed, .*\n", dumb)


def test_off_a_terminal_lines_are_whole(folder: Path) -> None:
    """A command with no terminal at all."""
    done = subprocess.run(
        [sys.executable, "-c", "from qaic_ray.cli import main; main()", "runs"],
        cwd=folder, env=without_terminal(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert re.fullmatch(r"run +state +rows +failed +tok/s +started +worked +tokens +model +program",
                        done.stdout.splitlines()[0])  # fmt: skip


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """A command of this process in that folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(folder)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qaic-ray", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capsys.readouterr())  # type: ignore[return-value]

    return run


def test_json_is_all_that_stdout_has(command: Command) -> None:
    runs = json.loads(command("runs", "--json")[1])["runs"]
    assert {run["name"]: run["state"] for run in runs} == {
        "run-20260101-000000": "unfinished",
        "run-20260102-000000": "done",
    }
    found = json.loads(command("status", "--json")[1])
    assert [run["total_rows"] for run in found["runs"]] == [3, 3]
    assert found["jobs"] == []


def test_show_says_what_it_can_where_the_model_is_gone(command: Command) -> None:
    code, out, _ = command("show", "run-20260101-000000", "0", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["row"]["text"] == "b"
    assert "cannot be rendered again" in document["remark"]
    assert command("show", "run-20260101-000000", "5")[0] == 2


def test_what_is_not_there_is_one_sentence(command: Command) -> None:
    code, _, err = command("runs", "nowhere")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = command("stop", "run-20260101-000000")
    assert code == 2
    assert "there is nothing to stop" in err


def test_logs_of_a_run_folder(folder: Path, command: Command) -> None:
    logs = folder / "runs" / "run-20260101-000000" / "logs"
    assert "no logs" in command("logs", "run-20260101-000000")[2]
    logs.mkdir()
    (logs / "card-0.log").write_text("opened\n")
    (logs / "card-1.log").write_text("lost\n")
    _, out, _ = command("logs", "run-20260101-000000")
    assert out == "==> logs/card-0.log <==\nopened\n==> logs/card-1.log <==\nlost\n"
