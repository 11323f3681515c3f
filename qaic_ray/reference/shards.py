"""The page of what is written of many rows: the proof of a merge, and the end mark of parts."""

from __future__ import annotations

from qaic_ray.reference.markdown import Fields, Note, field_table, page, section

_DIGEST = "5d0a..."
_PROOF: Fields = {
    "rows_in": Note("Rows of the input.", 1000),
    "rows_ok": Note("Rows with an answer.", 998),
    "rows_error": Note("Rows with an error. Together they are `rows_in`.", 2),
    "inputs_sha256": Note("Digest over the rows of the input, in order.", "9f2c..."),
    "outputs_sha256": Note("Digest of the bytes of outputs.jsonl.", _DIGEST),
}
MERGED: Fields = {
    "format": Note("Version of this document.", 1),
    **_PROOF,
    "inputs_sha256": Note(
        "SHA-256 of the `inputs_sha256` of all shards, as bytes, one behind the other.", "9f2c..."
    ),
    "errors_sha256": Note("Digest of the bytes of errors.jsonl.", "e3b0..."),
    "model": Note("The model, as the runs named it.", "smollm2-135m"),
    "qpc": Note("Name of the program.", "smollm2-135m-kv-64pl-512cl-14c-8BS-mx6"),
    "qpc_sha256": Note("Digest of the program.", "5f5f..."),
    "run_seed": Note("What the seeds of rows were made from.", 0),
    "dates": Note("What chat templates took for the date, in any of the runs.", ["2026-11-29"]),
    "chosen": Note(
        "`sample`, `sample_seed` and `limit` of every shard, where they were given.",
        {"sample": 0.05, "sample_seed": 0},
    ),
    "shards[].shard": Note("A shard.", "3/64"),
    "shards[].run": Note("Name of its run folder.", "run-20261129-090500-shard-3-of-64"),
    "shards[].first_row": Note("Index of its first row in the whole.", 500),
    **{f"shards[].{name}": told for name, told in _PROOF.items()},
    "files[].name": Note("A file of the input, below what named it.", "part-00002.jsonl.gz"),
    "files[].bytes": Note("Its size.", 4096, "bytes"),
    "files[].sha256": Note("Digest of its bytes; absent for a file at a URI.", "1b4f..."),
    "files[].mtime_ns": Note(
        "When a file at a URI was changed last.", 1764396395000000000, "Unix time, nanoseconds"
    ),
}
"""Keys of proof.json, which `merge --json` prints too."""

PARTS_DONE: Fields = {
    "format": Note("Version of this document.", 1),
    "run": Note("Name of the run folder, or of the folder of the merge.", "run-20261129-090500"),
    "shard": Note("The shard that the parts are of; null for a whole.", None),
    **{f"proof.{name}": told for name, told in _PROOF.items()},
    "proof.complete": Note("Whether the input was read to its end, and was one input.", True),
    "parts[].name": Note("A part file.", "part-00000.parquet"),
    "parts[].first": Note("Index of its first row.", 0),
    "parts[].rows": Note("Its rows.", 100000),
    "parts[].rows_sha256": Note("Digest of these rows as lines of outputs.jsonl.", "77ab..."),
    "parts[].bytes": Note("Its size.", 5242880, "bytes"),
    "parts[].sha256": Note("Digest of its bytes.", "c0de..."),
}
"""Keys of `_SUCCESS`."""


def shards_page() -> str:
    """docs/reference/shards.md."""
    return page(
        "Proof and parts of many rows",
        "How these are made is told in [many rows](../how-to/many-rows.md). `a[].b` is the key "
        "`b` of each object of the list `a`.",
        section(
            "proof.json",
            "`qaic-ray merge` writes it into its folder. It is the same for the same shards. "
            "`--json` prints it.",
            field_table(MERGED),
        ),
        section(
            "_SUCCESS",
            "A run with `--output-parts` writes it beside its part files when all of them are "
            "there. That of a shard is called `_SUCCESS-03-of-64`.",
            field_table(PARTS_DONE),
        ),
    )
