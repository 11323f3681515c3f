"""The page of `--json`: what each command prints there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from qaic_ray.model.checkpoint import ModelManifest
from qaic_ray.reference.markdown import Fields, Told, field_table, page, section

_RUN = "mine-20261129-090500"
_QPC = "smollm2-135m-kv-64pl-512cl-14c-8BS-mx6"
_UNIX = "Unix time, seconds"

RUN_STATUS: Fields = {
    "name": Told("Name of the run's folder.", _RUN),
    "folder": Told("The run's folder.", f"/home/me/runs/{_RUN}"),
    "job": Told("Name of the job, or `run`.", "mine"),
    "model": Told("The model.", "smollm2-135m"),
    "qpc": Told("Folder of the program.", f"/home/me/qpc/{_QPC}"),
    "state": Told("`running`, `unfinished` (it can be resumed) or `done`.", "running"),
    "rows": Told("Rows that have an answer or an error.", 40),
    "failed_rows": Told("Those with an error.", 1),
    "total_rows": Told("Rows of the input; null where that is not known.", 64),
    "generated_tokens": Told("Tokens of all answers.", 2560),
    "seconds": Told("Time in which cards worked, over all sessions.", 12.5, "seconds"),
    "tokens_per_s": Told("Generated tokens over these seconds.", 204.8, "tokens/s"),
    "eta_s": Told("Time to the end at this rate; null where that is not known.", 7.5, "seconds"),
    "started_s": Told("When the run began.", 1764396395.0, _UNIX),
    "last_row_s": Told("When the last row came.", 1764396407.5, _UNIX),
    "sessions": Told("How many processes have worked on it.", 1),
    "pid": Told("The process that works on it; null where none is seen.", 4242),
    "problem": Told("What of the folder cannot be read, in a sentence.", ""),
}
JOB_STATUS: Fields = {
    "id": Told("Id of the job on the cluster.", "mine-20261129-090500-1f2e"),
    "job": Told("Name of the job.", "mine"),
    "state": Told("`waiting`, `running`, `done`, `failed` or `stopped`.", "running"),
    "started_s": Told("When it began; null before.", 1764396395.0, _UNIX),
    "ended_s": Told("When it ended; null before.", None, _UNIX),
    "rows": Told("Rows that are done; null where nobody knows.", 40),
    "failed_rows": Told("Those with an error.", 1),
    "folder": Told("The run's folder on the cluster.", f"/shared/me/runs/{_RUN}"),
    "error": Told("Why it failed, in a sentence.", None),
}
DEVICE: Fields = {
    "qid": Told("Id of the card, as `--device-id` takes it.", 0),
    "status": Told("Its state, in the SDK's words.", "Ready"),
    "sku": Told("Its kind.", "Standard"),
    "nsp_total": Told("Its NSPs.", 14),
    "nsp_free": Told("Those that are free.", 14),
    "dram_total_bytes": Told("Its memory.", 17179869184, "bytes"),
    "dram_free_bytes": Told("What of it is free.", 17179869184, "bytes"),
    "board": Told("Serial number of its board; empty where nobody says.", "QAIC-0001"),
}
_STATUS: Fields = {
    **{f"runs[].{name}": told for name, told in RUN_STATUS.items()},
    **{f"jobs[].{name}": told for name, told in JOB_STATUS.items()},
    "runs_not_shown": Told("Runs that are done and not listed.", 0),
}
_ANY = {
    "format": Told("Version of this document.", 6),
    "name": Told("Name of the folder.", "smollm2-135m-kv"),
    "source": Told("The checkpoint.", "smollm2-135m"),
    "contract": Told("The interface: `position-ids` or `cache-index`.", "position-ids"),
    "continuous": Told("Whether it is for continuous batching.", True),
    "architecture": Told("The model's kind.", "llama"),
    "num_layers": Told("Its layers.", 30),
    "hidden_size": Told("Width of its states.", 576),
    "intermediate_size": Told("Width inside its MLPs.", 1536),
    "num_heads": Told("Its attention heads.", 9),
    "num_kv_heads": Told("Heads of the KV cache, copies too.", 3),
    "head_dim": Told("Width of a head.", 64),
    "vocab_size": Told("Its tokens.", 49152),
    "max_position": Told("The longest context.", 8192, "tokens"),
    "opset": Told("Opset of the graph.", 17),
    "dtype": Told("Type of the weights in the files.", "float32"),
    "eos_ids": Told("Tokens that end an answer.", [2]),
    "onnx_file": Told("The graph, within the folder.", "smollm2-135m-kv.onnx"),
    "weights_sha256": Told("Digest of the checkpoint's tensors.", "9f2c..."),
    "architecture_sha256": Told("Digest of its configuration.", "5d0a..."),
    "num_clipped": Told("Weights that were beyond the range of float16.", 0),
    "tool_versions": Told("Versions of what made it.", {"onnx": "1.23.2"}),
    "sources": Told("The weight files: name, size and time.", []),
    "kv_dtype": Told("Type of the KV cache on the card.", "float16"),
    "logits": Told("Of which tokens there are logits.", "last"),
    "next_tokens": Told("Whether token ids stand in the logits' place.", False),
    "num_replicate_kv_heads": Told("Copies of each KV head.", 1),
    "comp_ctx_lengths": Told("Whether there is such an input.", False),
    "files": Told("The export's own files.", []),
    "weights": Told("`copy`, or `reference`: they stay in the checkpoint's files.", "copy"),
}
_EXPORT: Fields = {
    "folder": Told("The folder that was made.", "smollm2-135m-kv"),
    "reused": Told("Whether it was there already.", False),
    **{field.name: _ANY[field.name] for field in fields(ModelManifest)},
}

ANSWERS: Mapping[str, tuple[str, Fields]] = {
    "run, launch, demo": (
        "The last line is the run's report: see [report.json](report.md), up to what is found in "
        "its rows. With `--stream rows` or `ordered` a line of each row comes before, a "
        "[row](rows.md) with these keys, and the report has `type` too.",
        {"type": Told("`row` or `report`.", "row")},
    ),
    "run --resume": (
        "Where there is nothing to go on with, the only key is this.",
        {"remark": Told("Why nothing is done.", "No run in runs is unfinished.")},
    ),
    "launch --detach": (
        "The job was handed to a cluster.",
        {
            "id": Told("Its id there.", "mine-20261129-090500-1f2e"),
            "job": Told("Name of the job.", "mine"),
            "folder": Told("Where its relative paths start there.", "/shared/me"),
            "sent": Told("Files that were sent -> bytes.", {"job.yaml": 512}),
            "expected": Told("Paths that must be there.", ["/shared/models/llama"]),
        },
    ),
    "serve": (
        "A line when the server is ready.",
        {
            "address": Told("Where it listens.", "http://127.0.0.1:8000"),
            "models": Told("Names of the model.", ["smollm2-135m"]),
            "pid": Told("Its process.", 4242),
        },
    ),
    "init": (
        "The files that were written.",
        {
            "job": Told("The job.", "mine.yaml"),
            "prompts": Told("Its prompts.", "mine-prompts.jsonl"),
            "model": Told("Its model.", "smollm2-135m"),
        },
    ),
    "schema JOB": (
        "The job has a schema for editors now. Without a job the answer is the schema itself.",
        {
            "job": Told("The job.", "mine.yaml"),
            "schema": Told("The schema beside it.", "/home/me/job.schema.json"),
        },
    ),
    "plan": (
        "What a job would do.",
        {
            "job": Told("Name of the job.", "mine"),
            "text": Told("What it would do, in a line.", "compile 1 QPC, run one on all cards"),
            "compiles[].name": Told("A program.", _QPC),
            "compiles[].command": Told("The compiler's command line.", ["qaic-exec", "-m=..."]),
            "compiles[].is_run": Told("Whether it is the one that is run.", True),
        },
    ),
    "export": ("The model that was made, with its manifest.", _EXPORT),
    "compile": (
        "What became of each variant.",
        {
            "variants[].name": Told("Name of the program.", _QPC),
            "variants[].ok": Told("Whether it is there.", True),
            "variants[].path": Told("Its folder.", f"qpc/{_QPC}"),
            "variants[].reused": Told("Whether it was there already.", False),
            "variants[].seconds": Told("How long it took.", 9.5, "seconds"),
            "variants[].qpc_bytes": Told("Its size.", 98566144, "bytes"),
            "variants[].error": Told("Where it is not there: why.", "The compiler failed: ..."),
            "variants[].exit_code": Told("Where the compiler failed: its exit code.", 255),
        },
    ),
    "status, stop": ("Runs here, and jobs of a cluster.", _STATUS),
    "runs": ("Runs of a folder.", {n: told for n, told in _STATUS.items() if n[:5] == "runs["}),
    "show": (
        "One row of a run.",
        {
            "folder": Told("The run's folder.", f"/home/me/runs/{_RUN}"),
            "row": Told("The [row](rows.md).", {"index": 17}),
            "rendered_prompt": Told("The text that the model was given.", "Why is it so?"),
            "prompt_token_ids": Told("Its tokens.", [2437, 338, 340]),
            "remark": Told("Why these are unknown, or may be others.", ""),
            "history[].session": Told("A session that had the row.", 0),
            "history[].at_s": Told("When, from the session's start.", 3.2, "seconds"),
            "history[].is_final": Told("Whether its row is the one that counts.", True),
            "history[].worker": Told("The card.", "card 3"),
            "history[].attempts": Told("How often it was given to one.", 1),
            "history[].finish_reason": Told("Why it ended.", "stop"),
            "history[].error": Told("Why it has no answer.", None),
        },
    ),
    "devices": (
        "The cards of this machine.",
        {
            "sdk": Told("The SDK.", "emulated SDK 1.20.2"),
            **{f"devices[].{name}": told for name, told in DEVICE.items()},
            "boards": Told("Board -> ids of its cards.", {"QAIC-0001": [0, 1, 2, 3]}),
        },
    ),
    "devices --address": (
        "The cards of a cluster.",
        {
            "nodes[].node": Told("The node, as Ray knows it.", {"address": "10.0.0.2"}),
            "nodes[].host": Told("Its machine.", "node-7"),
            "nodes[].boot_id": Told("The machine's boot: two nodes of one have the same.", "1f2e"),
            "nodes[].sdk_root": Told("Its SDK's folder.", "/opt/qti-aic"),
            "nodes[].sdk": Told("The SDK.", "SDK 1.20.2"),
            "nodes[].emulated": Told("Whether that is the emulated one.", False),
            **{f"nodes[].devices[].{name}": told for name, told in DEVICE.items()},
            "nodes[].held": Told("Card -> who holds it.", {"3": "run mine"}),
            "nodes[].error": Told("Why there are no cards.", ""),
            "problems": Told("What keeps cards from being used.", []),
        },
    ),
    "doctor": (
        "What was looked at. The exit code is 1 where something fails.",
        {
            "ok": Told("Whether nothing fails.", True),
            "checks[].check": Told("What was looked at.", "cards"),
            "checks[].verdict": Told("`ok`, `warn` or `fail`.", "ok"),
            "checks[].says": Told("How it is.", "4 cards are ready"),
            "checks[].remedy": Told("What to do about it.", ""),
            "checks[].node": Told("The machine, on a cluster.", ""),
            "facts": Told("All that is known of each machine.", [{"host": "node-7"}]),
        },
    ),
    "monitoring": (
        "The configuration that was written.",
        {
            "folder": Told("Its folder.", "monitoring"),
            "files": Told("Its files.", ["monitoring/prometheus.yml"]),
            "commands.prometheus": Told("What starts Prometheus.", "prometheus --config..."),
            "commands.grafana": Told("What starts Grafana.", "grafana server ..."),
        },
    ),
    "key": (
        "A new API key.",
        {
            "name": Told("Whose it is.", "alice"),
            "key": Told("The key. It is kept nowhere.", "qr-..."),
            "line": Told("Its line for a file of keys.", "alice:sha256:9f2c..."),
        },
    ),
    "ray show": (
        "The Ray that is kept.",
        {
            "address": Told("Its address.", "127.0.0.1:6379"),
            "dashboard": Told("Its dashboard.", "http://127.0.0.1:8265"),
            "ways_in": Told("How a person gets in, line by line.", ["http://127.0.0.1:8265"]),
        },
    ),
    "ray env": (
        "Variables by which programs reach it; null stands for one that is to be unset.",
        {
            "RAY_ADDRESS": Told("Its address.", "127.0.0.1:6379"),
            "RAY_API_SERVER_ADDRESS": Told("Its dashboard.", "http://127.0.0.1:8265"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": Told("Ray's word for: this machine only.", "0"),
            "RAY_AUTH_MODE": Told("Whether it wants a token.", "token"),
            "RAY_AUTH_TOKEN_PATH": Told("The file of its token.", "/home/me/.cache/.../token"),
            "RAY_AUTH_TOKEN": Told("Unset, since it would go before the file.", None),
        },
    ),
    "ray stop": ("", {"ended": Told("Whether there was one.", True)}),
    "emulator install": (
        "The SDK that was laid down.",
        {
            "sdk": Told("Its name and version.", "emulated SDK 1.20.2"),
            "root": Told("Its folder.", "/home/me/sdk"),
            "cards": Told("How many cards it has.", 4),
        },
    ),
}
"""What a command prints with --json."""


def answers_page() -> str:
    """docs/reference/answers.md."""
    return page(
        "JSON on stdout",
        "With `--json` a command prints JSON on stdout, and nothing else: an object on a line. "
        "Progress and errors go to stderr. `a.b` is the key `b` of the object `a`; `a[].b` is the "
        "key `b` of each object of the list `a`. `report --json` prints "
        "[report.json](report.md).",
        *(
            section(name, *([meaning] if meaning else []), field_table(told))
            for name, (meaning, told) in ANSWERS.items()
        ),
    )
