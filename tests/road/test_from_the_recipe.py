"""docs/from-the-recipe.md: each of its command blocks, as it stands, on a small Llama in Amber's
place and the emulated SDK. One Ray."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-the-recipe.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|text)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SNAPSHOT = "models--LLM360--Amber/snapshots/e691febcfceb864f235225f4e6dcae07e2be6332"
QPCS = [
    line for kind, text in BLOCKS if kind == "text" for line in text.splitlines() if "pl-" in line
]
RAY = "from qaic_ray.cluster import kept_ray; kept_ray.start(4, wanted=4)"


@pytest.mark.slow
@pytest.mark.cluster
def test_every_command_of_the_page_runs_in_a_fresh_folder(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fresh"
    model = folder / SNAPSHOT
    model.parent.mkdir(parents=True)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    model.mkdir()
    for path in tiny_checkpoint.iterdir():
        (model / path.name).symlink_to(path)
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
        "QAIC_RAY_SDK": "emulated",
        "QAIC_RAY_CACHE": str(tmp_path / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NO_COLOR": "1",
    }

    def shell(text: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(["bash", "-ec", text], cwd=folder, env=environment, timeout=600,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stderr}\n{done.stdout}"
        return done

    shell(f"{sys.executable} -c '{RAY}'")
    try:
        done = [shell(text) for kind, text in BLOCKS if kind == "sh"]
    finally:
        shell("qaic-ray ray stop")

    exported, _, compiled, first, batch, further = done
    assert "Largest absolute difference to PyTorch" in exported.stdout
    listed = compiled.stdout.splitlines()[2:]
    named = [line for line in QPCS if not line.startswith(("bash", "python"))]
    assert listed == named
    link = folder / "qpc" / listed[0]
    assert os.readlink(link).endswith("-4BS-mx6")  # the last compile of the page
    assert "leads to" in first.stderr
    rates = [float(found) for each in (first, batch) for found in re.findall(
        r"Output Tokens/sec per Card = ([\d.]+)", each.stdout)]  # fmt: skip
    assert len(rates) == 2
    assert "runModel" not in further.stdout

    runs = sorted((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    rows = [rows_of(run) for run in runs]
    assert [len(each) for each in rows] == [1, 5, 1]
    # The script's arithmetic on each run's own rows.
    for rate, answers, size in zip(rates, rows, (1, 4), strict=False):
        steps = sum(len(row["token_ids"]) - 2 for row in answers)
        seconds = sum(row["decode_s"] for row in answers)
        assert rate == pytest.approx(size * steps / seconds, rel=0.001)
    assert [row["worker"] for row in rows[0]] == ["card 2"]
    assert {row["worker"] for row in rows[1]} <= {"card 2", "card 3"}


def rows_of(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "outputs.jsonl").read_text().splitlines()]
