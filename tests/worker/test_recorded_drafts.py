"""A worker with a draft QPC records both programs; each bundle replays to the last bit."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from byte_tokens import byte_tokenizer

from qaic_ray.bundles.compare import compare_bundles, read_bundle
from qaic_ray.bundles.record import Recording, replay_command
from qaic_ray.emulator import folder, runner
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation
from qaic_ray.rows import Prompt
from qaic_ray.worker.worker import CardWorker, WorkerSpec

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

MOST = 6


class ByteWorker(CardWorker):
    """A worker whose tokens are bytes: the tiny model has no tokenizer."""

    load_tokenizer = staticmethod(lambda _: Tokenizer(byte_tokenizer("<end>"), {}, (2,)))


def test_the_draft_program_has_a_bundle_of_its_own(
    tiny: TinyQpcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = tiny.qpc(batch_size=2, num_speculative_tokens=3, num_cores=8)
    draft = tiny.qpc(batch_size=2, num_cores=4)
    worker = ByteWorker(
        WorkerSpec(
            name="card 1",
            device_ids=(1,),
            sdk_root=str(tiny.sdk.root),
            qpc=str(main),
            model=str(tiny.checkpoint.folder),
            generation=Generation(draft_qpc=str(draft), generation_len=24),
            recording=Recording(str(tmp_path / "bundles"), MOST),
        )
    )
    worker.open()
    rows = [r for some in worker.answer([Prompt(0, "one"), Prompt(1, "two")]) for r in some]
    worker.close()
    assert [len(row.token_ids) for row in rows] == [24, 24]

    found = {path.name: path for path in (tmp_path / "bundles").iterdir()}
    assert sorted(found) == ["card-1", "card-1-draft"]
    assert json.loads((found["card-1-draft"] / "bundle.json").read_text())["qpc"] == str(draft)
    monkeypatch.setenv(folder.ROOT_VARIABLE, str(tiny.sdk.root))
    monkeypatch.chdir(tmp_path)
    for name, qpc in (("card-1", main), ("card-1-draft", draft)):
        bundle = read_bundle(found[name])
        assert len(bundle.executions) == MOST
        argv = ["-t", str(qpc), "--aic-batch-json-input", str(found[name] / "aic_batch_io.json")]
        argv += ["--write-output-dir", f"{name}-again", "--write-output-num-samples", str(MOST)]
        assert runner.main(argv) == 0
        again = compare_bundles(bundle, read_bundle(tmp_path / f"{name}-again"))
        assert (again.executions, again.difference) == (MOST, None)
        if name == "card-1":  # and this is what a run says
            said = replay_command(tmp_path / "bundles", qpc, ["a", "qaic-runner"])
            assert said == shlex.join(["a", "qaic-runner", *argv])


def test_nothing_is_said_where_nothing_was_recorded(tmp_path: Path) -> None:
    assert replay_command(tmp_path / "bundles", tmp_path, ["qaic-runner"]) is None
