"""Millions of rows in many files, in shards by several drivers, one killed; then merged.

    python benchmarks/many_rows.py [--rows 2000000] [--files 64] [--shards 4] [--s3]

Each shard is a process: the product's own step reads the input, dispatches, journals, writes
outputs.jsonl and parquet parts, on simulated cards that take no time; there is no Ray and no model.
One driver is killed (SIGKILL) at two fifths of its rows and resumed. `qaic-ray merge` joins them,
and every row is compared with what was laid. With --s3 the input is read from a bucket, and the
parts go to one (moto's server, a process on the loopback interface). Prints a table of each
driver's memory, and one JSON object as its last line; rates are this machine's, never a card's.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("jsonl", "jsonl.gz", "parquet", "csv")
SLOTS, PART_ROWS = 64, 100_000
NUM_SHOWN = 12
KILLED_SHARD, KILLED_AT = 2, 0.4
FLAT_MB = 40.0
"""What a driver that came to its end may have had at most in the second half of its rows, over what
it had at most in the first. Writing a part takes memory for a moment, so that one look at either
tells nothing."""
BUCKET = "many-rows"
ROW_BITS = 40


def counts_of(options: argparse.Namespace) -> list[int]:
    """Rows of each file."""
    return [
        options.rows * (n + 1) // options.files - options.rows * n // options.files
        for n in range(options.files)
    ]


def lay_inputs(folder: Path, counts: list[int]) -> None:
    """Part files in four formats, of short rows."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    first = 0
    for number, count in enumerate(counts):
        kind = KINDS[number % len(KINDS)]
        path = folder / f"part-{number:05}.{kind}"
        numbers = range(first, first + count)
        if kind == "parquet":
            columns = {"id": [f"r{n}" for n in numbers], "prompt": [f"Item {n}" for n in numbers]}
            parquet.write_table(pyarrow.table(columns), path)
        elif kind == "csv":
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "prompt"])
                writer.writerows([f"r{n}", f"Item {n}"] for n in numbers)
        else:
            lines = "".join(f'{{"id": "r{n}", "prompt": "Item {n}"}}\n' for n in numbers).encode()
            path.write_bytes(gzip.compress(lines, 1) if kind == "jsonl.gz" else lines)
        first += count


def drive_here(words: dict[str, Any]) -> None:
    """A driver's process."""
    sys.path.append(str(ROOT / "tests"))
    from shard_drivers import FlatCards, drive, resumed_run, run_of

    done = Path(words["done"])
    told = 0

    def on_row(_: object) -> None:
        nonlocal told
        told += 1
        if not told % 1000:
            done.write_text(str(told))

    if resume := words.get("resume"):
        request = resumed_run(Path(resume))
    else:
        request = run_of(Path(words["folder"]), **words["run"])
    summary = drive(request, slots=SLOTS, cards=FlatCards, on_row=on_row)
    done.write_text(str(told))
    assert summary.proof is not None
    assert summary.proof.holds


@dataclass
class Watched:
    """A driver, and its memory over time: seconds, rows shown by it, MB."""

    shard: int
    process: subprocess.Popen[bytes]
    done: Path
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    samples: list[tuple[float, int, float]] = field(default_factory=list)

    def look(self) -> bool:
        """Take a sample; whether it still runs."""
        if self.process.poll() is not None:
            self.ended_s = self.ended_s or time.monotonic()
            return False
        try:
            rss_mb = psutil.Process(self.process.pid).memory_info().rss / 1e6
        except psutil.NoSuchProcess:
            return False
        rows = int(self.done.read_text() or 0) if self.done.exists() else 0
        self.samples.append((time.monotonic() - self.began_s, rows, rss_mb))
        return True

    @property
    def growth_mb(self) -> float:
        """The peak of the second half of the rows over that of the first."""
        half = self.samples[-1][1] / 2
        first = max(mb for _, rows, mb in self.samples if rows <= half)
        return max(mb for _, rows, mb in self.samples if rows > half) - first


def start(folder: Path, name: str, words: dict[str, Any], shard: int) -> Watched:
    done = folder / f"{name}.done"
    done.unlink(missing_ok=True)
    argv = [sys.executable, __file__, "--drive", json.dumps({**words, "done": str(done)})]
    return Watched(shard, subprocess.Popen(argv), done)


def run_shards(folder: Path, where: dict[str, str], options: argparse.Namespace) -> list[Watched]:
    """All shards at the same time; the killed one resumed when it is dead."""
    rows_a_shard = options.rows / options.shards
    watched = []
    for number in range(1, options.shards + 1):
        run = {
            "prompts": where["input"],
            "shard": f"{number}/{options.shards}",
            "output_parts": where["parts"],
            "part_rows": options.part_rows,
            "output": str(folder / "runs" / f"{number}"),
        }
        words = {"folder": str(folder / "made" / str(number)), "run": run}
        watched.append(start(folder, f"shard{number}", words, number))
    victim = watched[min(KILLED_SHARD, options.shards) - 1]
    is_killed = False
    running = list(watched)
    while running:
        time.sleep(0.5)
        running = [one for one in running if one.look()]
        if not is_killed and victim.samples and victim.samples[-1][1] > KILLED_AT * rows_a_shard:
            victim.process.send_signal(signal.SIGKILL)
            victim.process.wait()
            is_killed = True
            (run_folder,) = (folder / "runs" / f"{victim.shard}").iterdir()
            words = {"resume": str(run_folder)}
            watched.append(start(folder, f"resumed{victim.shard}", words, victim.shard))
            running = [one for one in running if one is not victim] + [watched[-1]]
    if not is_killed:
        raise SystemExit("the driver was done before it was killed: take more rows")
    for one in watched:
        wanted = -signal.SIGKILL if one is victim else 0
        if one.process.returncode != wanted:
            raise SystemExit(f"shard {one.shard} ended with {one.process.returncode}")
    return watched


def merge(folder: Path) -> dict[str, Any]:
    """By the command, watched; its figures."""
    merged = folder / "merged"
    words = [sys.executable, "-m", "qaic_ray", "merge", str(folder / "runs" / "*" / "*")]
    began_s, peak_mb = time.monotonic(), 0.0
    with subprocess.Popen([*words, "-o", str(merged), "--json"], stdout=subprocess.DEVNULL) as one:
        while one.poll() is None:
            try:
                peak_mb = max(peak_mb, psutil.Process(one.pid).memory_info().rss / 1e6)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.2)
    if one.wait():
        raise SystemExit(f"merge ended with {one.returncode}")
    return {"merge_s": time.monotonic() - began_s, "merge_peak_mb": peak_mb}


def check_merged(folder: Path, counts: list[int]) -> dict[str, Any]:
    """Every row once, in order, as it was laid; the proof counted again.

    Raises:
        SystemExit: it is not so.
    """
    proof = json.loads((folder / "proof.json").read_bytes())
    digest, number = hashlib.sha256(), 0
    places = ((file, row) for file, count in enumerate(counts) for row in range(count))
    with (folder / "outputs.jsonl").open("rb") as lines:
        for number, (line, (file, place)) in enumerate(zip(lines, places, strict=True), start=1):
            digest.update(line)
            row = json.loads(line)
            text = f"ITEM {number - 1} {file << ROW_BITS | place}"
            found = row["index"], row["id"], row["text"]
            if found != (number - 1, f"r{number - 1}", text):
                raise SystemExit(f"row {number - 1} is {found}")
    if digest.hexdigest() != proof["outputs_sha256"]:
        raise SystemExit("the proof has another digest than sha256 gives")
    if not number == proof["rows_in"] == proof["rows_ok"] + proof["rows_error"]:
        raise SystemExit(f"the proof counts {proof['rows_in']} rows, and there are {number}")
    return {"rows": number, "outputs_sha256": proof["outputs_sha256"]}


def check_parts(names: list[str], read: Any, rows: int) -> int:
    """That the part files, by name, hold every row once in order; how many they are."""
    from pyarrow import parquet

    number = 0
    names = sorted(name for name in names if name.endswith(".parquet"))
    for name in names:
        for value in parquet.read_table(io.BytesIO(read(name)), columns=["id"])["id"].to_pylist():
            if value != f"r{number}":
                raise SystemExit(f"{name} has {value} where r{number} should be")
            number += 1
    if number != rows:
        raise SystemExit(f"the parts have {number} rows, not {rows}")
    return len(names)


def show(figures: dict[str, Any], watched: list[Watched]) -> None:
    """A table for people: memory of each driver as its rows come."""
    table = Table(title=f"{figures['rows']:,} rows: MB of each driver, at its rows")
    table.add_column("rows shown", justify="right")
    names = [str(one.shard) for one in watched[:-1]] + [f"{watched[-1].shard}, resumed"]
    for name in names:
        table.add_column(f"shard {name}", justify="right")
    most = max(one.samples[-1][1] for one in watched)
    for step in range(1, NUM_SHOWN + 1):
        rows = most * step // NUM_SHOWN
        cells = []
        for one in watched:
            at = next((mb for _, shown, mb in one.samples if shown >= rows), None)
            cells.append("" if at is None else f"{at:.0f}")
        table.add_row(f"{rows:,}", *cells)
    Console().print(table)
    print(f"{figures['seconds']:.0f} s for all shards: {figures['rows_per_s']:,.0f} rows a second")
    print(f"{figures['merge_s']:.0f} s to merge, {figures['merge_peak_mb']:.0f} MB at most")
    holds = figures["growth_mb"] < FLAT_MB
    print(
        f"{figures['growth_mb']:.0f} MB more in the second half of a driver's rows: "
        f"{'holds' if holds else 'MISSED'}"
    )


def s3_process(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """moto's server in its own process, and its URL."""
    one = subprocess.Popen(
        [sys.executable, __file__, "--serve-s3", str(folder / "s3.url")], text=True
    )
    while not (folder / "s3.url").exists():
        if one.poll() is not None:
            raise SystemExit("the S3 server ended")
        time.sleep(0.1)
    return one, (folder / "s3.url").read_text()


def serve_s3(note: Path) -> None:
    """Be that server until the end."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    unfinished = note.with_suffix(".unfinished")
    unfinished.write_text(f"http://{host}:{port}")
    unfinished.rename(note)
    signal.pause()


def in_bucket(folder: Path, url: str) -> dict[str, str]:
    """Put the input into a bucket; what names it there, and the parts."""
    import boto3

    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "b", "AWS_SECRET_ACCESS_KEY": "b"}
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), BUCKET, f"in/{path.name}")
    return {"input": f"s3://{BUCKET}/in", "parts": f"s3://{BUCKET}/parts"}


def bucket_files() -> Iterator[tuple[str, bytes]]:
    import boto3

    client = boto3.client("s3")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="parts/"):
        for key in page["Contents"]:
            body = client.get_object(Bucket=BUCKET, Key=key["Key"])["Body"].read()
            yield key["Key"].removeprefix("parts/"), body


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[Watched]]:
    """The whole, in a folder."""
    counts = counts_of(options)
    lay_inputs(folder / "in", counts)
    where = {"input": str(folder / "in"), "parts": str(folder / "parts")}
    server = None
    try:
        if options.s3:
            server, url = s3_process(folder)
            where = in_bucket(folder / "in", url)
        began_s = time.monotonic()
        watched = run_shards(folder, where, options)
        seconds = time.monotonic() - began_s
        figures = {"s3": options.s3, "files": options.files, "shards": options.shards}
        figures |= merge(folder)
        figures |= check_merged(folder / "merged", counts)
        if options.s3:
            parts = dict(bucket_files())
        else:
            parts = {p.name: p.read_bytes() for p in (folder / "parts").iterdir()}
        figures["part_files"] = check_parts(list(parts), parts.__getitem__, options.rows)
    finally:
        if server is not None:
            server.terminate()
            server.wait()
    figures |= {
        "seconds": seconds,
        "rows_per_s": options.rows / seconds,
        "growth_mb": max(one.growth_mb for one in watched if one.process.returncode == 0),
        "peak_mb": max(mb for one in watched for _, _, mb in one.samples),
        "drivers": [
            {"shard": one.shard, "samples": one.samples[:: max(1, len(one.samples) // 20)]}
            for one in watched
        ],
    }
    return figures, watched


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--files", type=int, default=64)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--part-rows", type=int, default=PART_ROWS)
    parser.add_argument("--s3", action="store_true", help="from and to a bucket")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--serve-s3", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive is not None:
        drive_here(json.loads(options.drive))
        return
    if options.serve_s3 is not None:
        serve_s3(options.serve_s3)
        return
    with tempfile.TemporaryDirectory() as name:
        figures, watched = measure(Path(name), options)
    show(figures, watched)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
