"""Every document that a stranger may have touched, made odd: an error of ours, or it is read.

The shapes of the good ones are what the code writes; the errors are judged by their type, their
length, and by what a reader of a terminal would say of them: one line.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from mutations import documents, texts

from qaic_ray.cards.inventory import qpc_cores
from qaic_ray.compile.store import check_kept, check_ours, content_key, is_current, read_record
from qaic_ray.contract import Specializations
from qaic_ray.errors import QaicRayError
from qaic_ray.options import RunOptions
from qaic_ray.pipeline.compile_step import open_folder
from qaic_ray.pipeline.job import chosen_index, dump_job, job_from, load_job
from qaic_ray.pipeline.request import REQUEST_NAME, RunRequest, read_request
from qaic_ray.runs.journal import Journal
from qaic_ray.sdk import compiler_digest, open_sdk, parse_devices

MAX_ERROR_CHARS = 1500
NUMBER = 125
"""By structure, and as many by bytes, of each of the ten: 2,000 in all."""

JOB: dict[str, Any] = {
    "name": "small",
    "model": {"name": "smollm2-135m"},
    "compile": {"precision": ["mx6"], "batch_size": [4], "prompt_len": [16, "32+64"]},
    "run": {"variant": {"prompt_len": 16}, "devices": [0, 1], "prompt": "a|b", "seed": 1},
    "emulator": {"cards": 2},
}
SHAPES = Specializations.build(batch_size=4, prompt_len=32, ctx_len=256, continuous=True)
REQUEST = RunRequest("r", "tiny", Path("/q"), RunOptions(devices=(0,), prompt="a", seed=0))
HEADER = {
    "format": 1,
    "run": "0123456789abcdef",
    "session": 0,
    "retry_errors": False,
    "fingerprint": {"input": {"sha256": "ab"}, "qpc": "cd"},
}


def survived(attempt: Callable[[], object]) -> None:
    """Run it; an error must be one of ours, on one line of a sane length."""
    try:
        attempt()
    except QaicRayError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) <= MAX_ERROR_CHARS, text[:300]


def odd(good: Any, seed: int) -> Iterator[bytes]:
    """Mutations of a document, by its structure and by its bytes."""
    for value in documents(good, seed, NUMBER):
        yield json.dumps(value).encode()
    yield from texts(json.dumps(good, indent=1), seed, NUMBER)


def test_jobs(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    full = yaml.safe_load(dump_job(job_from(JOB, source="job")))
    for data in odd(full, 1):
        path.write_bytes(data)
        survived(lambda: chosen_index(load_job(path)))


@pytest.mark.parametrize("named", [False, True])
def test_specializations(tmp_path: Path, named: bool) -> None:
    path = tmp_path / "specializations.json"
    for data in odd(json.loads(SHAPES.to_json(named=named)), 2):
        path.write_bytes(data)
        survived(lambda: Specializations.load(path))


def test_manifests(make_model_dir: Callable[..., Path]) -> None:
    folder = make_model_dir()
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    status = {"name": "a", "num_bytes": 0, "mtime_ns": 1, "ctime_ns": 1, "inode": 1}
    good["sources"] = [status]
    (folder / "custom_io.yaml").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    good["files"] = [{"name": "custom_io.yaml", "status": status, "sha256": empty}]
    path.write_text(json.dumps(good))
    assert open_folder(folder).max_position == 2048
    for data in odd(good, 3):
        path.write_bytes(data)
        survived(lambda: open_folder(folder))


def test_variants(tmp_path: Path) -> None:
    header = bytes.fromhex("7ccda100 00010100 1800000000000000 0000000000000000")
    (tmp_path / "programqpc.bin").write_bytes(header)
    status = {"name": "programqpc.bin", "num_bytes": 24, "mtime_ns": 1, "ctime_ns": 1, "inode": 1}
    good = {
        "key": "ab",
        "entries": {"format": "1"},
        "num_cores": 14,
        "files": [{"name": "programqpc.bin", "status": status, "sha256": "cd"}],
        "seal": "ef",
    }
    for data in odd(good, 4):
        (tmp_path / "variant.json").write_bytes(data)
        survived(lambda: read_record(tmp_path))
        survived(lambda: qpc_cores(tmp_path))
        survived(lambda: check_kept(tmp_path))
        survived(lambda: check_ours(tmp_path))
        assert not is_current(tmp_path, [("format", "1")])
        assert content_key(tmp_path)


def test_requests(tmp_path: Path) -> None:
    good = yaml.safe_load(REQUEST.to_yaml())
    for data in odd(good, 5):
        (tmp_path / REQUEST_NAME).write_bytes(data)
        survived(lambda: read_request(tmp_path))


def test_journal_headers(tmp_path: Path) -> None:
    """With a checksum that is right: damage is the tests' of the journal."""
    segment = tmp_path / "journal" / "000000.jsonl"
    segment.parent.mkdir()

    def open_journal() -> None:
        Journal(tmp_path, HEADER["fingerprint"]).close()  # type: ignore[arg-type]

    for data in odd(HEADER, 6):
        for path in segment.parent.iterdir():
            path.unlink()
        line = data.replace(b"\n", b" ")
        segment.write_bytes(b"%08x %s\n" % (zlib.crc32(line), line))
        survived(open_journal)


def test_sdk_folders(tmp_path: Path) -> None:
    (tmp_path / "exec").mkdir()
    (tmp_path / "exec" / "qaic-exec").touch()
    (tmp_path / "versions").mkdir()
    versions = tmp_path / "versions" / "apps.xml"
    xml = "<versions><ci_build><base_version>1.20</base_version></ci_build></versions>"
    for data in texts(xml, 7, NUMBER):
        versions.write_bytes(data)
        survived(lambda: open_sdk(tmp_path).version)
    versions.write_text(xml)
    sdk = open_sdk(tmp_path)
    for data in odd({"emulated": True, "cards": 4, "digest": "ab"}, 8):
        (tmp_path / "emulated-sdk.json").write_bytes(data)
        survived(lambda: compiler_digest(sdk))


def test_the_device_tool_s_text() -> None:
    good = (
        "QID 0\n\tStatus:Ready\n\tDram Total:16308 MB\n\tDram Free:16000 MB\n"
        "\tNsp Total:14\n\tNsp Free:7\n\tSku Type:PCIe\n"
    )
    for data in texts(good, 9, NUMBER):
        text = data.decode(errors="replace")
        survived(partial(parse_devices, text))


@pytest.mark.parametrize(
    "override",
    [
        f"run.{'x' * 100_000}=1",
        f"{'a.' * 20_000}b=1",
        f"run.seed={'[' * 50_000}",
        f"run.seed={'9' * 5000}",
        f"run.seed={'9' * 4000}",
        f"run.prompt={'x' * 1_000_000}",
        f"name={'x' * 1_000_000}",
        "run.prompts=~nosuchuser/x",
        "run.seed=&a [*a]",
        "model.name=[]",
        f"compile.ctx_len=[{','.join(map(str, range(1, 50_000)))}]",
        "compile.ctx_len=true",
        "compile.batch_size=1e400",
    ],
    ids=lambda override: override[:24],
)
def test_overrides(tmp_path: Path, override: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB))
    survived(lambda: load_job(path, [override]))
