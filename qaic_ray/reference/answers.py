"""The page of `--json`: what each command prints there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from qaic_ray.model.checkpoint import ModelManifest
from qaic_ray.reference.markdown import Fields, Note, field_table, page, section
from qaic_ray.reference.shards import MERGED

_RUN = "mine-20261129-090500"
_QPC = "smollm2-135m-kv-64pl-512cl-14c-8BS-mx6"
_UNIX = "Unix time, seconds"

RUN_STATUS: Fields = {
    "name": Note("Name of the run's folder.", _RUN),
    "folder": Note("The run's folder.", f"/home/me/runs/{_RUN}"),
    "job": Note("Name of the job, or `run`.", "mine"),
    "model": Note("The model.", "smollm2-135m"),
    "qpc": Note("Folder of the program.", f"/home/me/qpc/{_QPC}"),
    "state": Note("`running`, `unfinished` (it can be resumed) or `done`.", "running"),
    "rows": Note("Rows that have an answer or an error.", 40),
    "failed_rows": Note("Those with an error.", 1),
    "total_rows": Note("Rows of the input; null where that is not known.", 64),
    "generated_tokens": Note("Tokens of all answers.", 2560),
    "seconds": Note("Time in which cards worked, over all sessions.", 12.5, "seconds"),
    "tokens_per_s": Note("Generated tokens over these seconds.", 204.8, "tokens/s"),
    "eta_s": Note("Time to the end at this rate; null where that is not known.", 7.5, "seconds"),
    "started_s": Note("When the run began.", 1764396395.0, _UNIX),
    "last_row_s": Note("When the last row came.", 1764396407.5, _UNIX),
    "sessions": Note("How many processes have worked on it.", 1),
    "pid": Note("The process that works on it; null where none is seen.", 4242),
    "problem": Note("What of the folder cannot be read, in a sentence.", ""),
}
JOB_STATUS: Fields = {
    "id": Note("Id of the job on the cluster.", "mine-20261129-090500-1f2e"),
    "job": Note("Name of the job.", "mine"),
    "state": Note("`waiting`, `running`, `done`, `failed` or `stopped`.", "running"),
    "started_s": Note("When it began; null before.", 1764396395.0, _UNIX),
    "ended_s": Note("When it ended; null before.", None, _UNIX),
    "rows": Note("Rows that are done; null where nobody knows.", 40),
    "failed_rows": Note("Those with an error.", 1),
    "folder": Note("The run's folder on the cluster.", f"/shared/me/runs/{_RUN}"),
    "error": Note("Why it failed, in a sentence.", None),
}
DEVICE: Fields = {
    "qid": Note("Id of the card, as `--device-id` takes it.", 0),
    "status": Note("Its state, in the SDK's words.", "Ready"),
    "sku": Note("Its kind.", "Standard"),
    "nsp_total": Note("Its NSPs.", 14),
    "nsp_free": Note("Those that are free.", 14),
    "dram_total_bytes": Note("Its memory.", 17179869184, "bytes"),
    "dram_free_bytes": Note("What of it is free.", 17179869184, "bytes"),
    "board": Note("Serial number of its board; empty where nobody says.", "QAIC-0001"),
}
_STATUS: Fields = {
    **{f"runs[].{name}": told for name, told in RUN_STATUS.items()},
    **{f"jobs[].{name}": told for name, told in JOB_STATUS.items()},
    "runs_not_shown": Note("Runs that are done and not listed.", 0),
}
_ANY = {
    "format": Note("Version of this document.", 6),
    "name": Note("Name of the folder.", "smollm2-135m-kv"),
    "source": Note("The checkpoint.", "smollm2-135m"),
    "contract": Note("The interface: `position-ids` or `cache-index`.", "position-ids"),
    "continuous": Note("Whether it is for continuous batching.", True),
    "architecture": Note("The model's kind.", "llama"),
    "num_layers": Note("Its layers.", 30),
    "hidden_size": Note("Width of its states.", 576),
    "intermediate_size": Note("Width inside its MLPs.", 1536),
    "num_heads": Note("Its attention heads.", 9),
    "num_kv_heads": Note("Heads of the KV cache, copies too.", 3),
    "head_dim": Note("Width of a head.", 64),
    "vocab_size": Note("Its tokens.", 49152),
    "max_position": Note("The longest context.", 8192, "tokens"),
    "opset": Note("Opset of the graph.", 17),
    "dtype": Note("Type of the weights in the files.", "float32"),
    "eos_ids": Note("Tokens that end an answer.", [2]),
    "onnx_file": Note("The graph, within the folder.", "smollm2-135m-kv.onnx"),
    "weights_sha256": Note("Digest of the checkpoint's tensors.", "9f2c..."),
    "architecture_sha256": Note("Digest of its configuration.", "5d0a..."),
    "num_clipped": Note("Weights that were beyond the range of float16.", 0),
    "tool_versions": Note("Versions of what made it.", {"onnx": "1.23.2"}),
    "sources": Note("The weight files: name, size and time.", []),
    "kv_dtype": Note("Type of the KV cache on the card.", "float16"),
    "logits": Note("Of which tokens there are logits.", "last"),
    "next_tokens": Note("Whether token ids stand in the logits' place.", False),
    "num_replicate_kv_heads": Note("Copies of each KV head.", 1),
    "comp_ctx_lengths": Note("Whether there is such an input.", False),
    "files": Note("The export's own files.", []),
    "weights": Note("`copy`, or `reference`: they stay in the checkpoint's files.", "copy"),
}
_EXPORT: Fields = {
    "folder": Note("The folder that was made.", "smollm2-135m-kv"),
    "reused": Note("Whether it was there already.", False),
    **{field.name: _ANY[field.name] for field in fields(ModelManifest)},
}

ANSWERS: Mapping[str, tuple[str, Fields]] = {
    "run, launch, demo": (
        "The last line is the run's report: see [report.json](report.md), up to what is found in "
        "its rows. With `--stream rows` or `ordered` a line of each row comes before, a "
        "[row](rows.md) with these keys, and the report has `type` too.",
        {"type": Note("`row` or `report`.", "row")},
    ),
    "run --resume": (
        "Where there is nothing to go on with, the only key is this.",
        {"remark": Note("Why nothing is done.", "No run in runs is unfinished.")},
    ),
    "launch --detach": (
        "The job was handed to a cluster.",
        {
            "id": Note("Its id there.", "mine-20261129-090500-1f2e"),
            "job": Note("Name of the job.", "mine"),
            "folder": Note("Where its relative paths start there.", "/shared/me"),
            "sent": Note("Files that were sent -> bytes.", {"job.yaml": 512}),
            "expected": Note("Paths that must be there.", ["/shared/models/llama"]),
        },
    ),
    "serve": (
        "A line when the server is ready.",
        {
            "address": Note("Where it listens.", "http://127.0.0.1:8000"),
            "models": Note("Names of the model.", ["smollm2-135m"]),
            "pid": Note("Its process.", 4242),
        },
    ),
    "init": (
        "The files that were written.",
        {
            "job": Note("The job.", "mine.yaml"),
            "prompts": Note("Its prompts.", "mine-prompts.jsonl"),
            "model": Note("Its model.", "smollm2-135m"),
        },
    ),
    "schema JOB": (
        "The job has a schema for editors now. Without a job the answer is the schema itself.",
        {
            "job": Note("The job.", "mine.yaml"),
            "schema": Note("The schema beside it.", "/home/me/job.schema.json"),
        },
    ),
    "plan": (
        "What a job would do.",
        {
            "job": Note("Name of the job.", "mine"),
            "text": Note("What it would do, in a line.", "compile 1 QPC, run one on all cards"),
            "compiles[].name": Note("A program.", _QPC),
            "compiles[].command": Note("The compiler's command line.", ["qaic-exec", "-m=..."]),
            "compiles[].is_run": Note("Whether it is the one that is run.", True),
        },
    ),
    "export": ("The model that was made, with its manifest.", _EXPORT),
    "compile": (
        "What became of each variant.",
        {
            "variants[].name": Note("Name of the program.", _QPC),
            "variants[].ok": Note("Whether it is there.", True),
            "variants[].path": Note("Its folder.", f"qpc/{_QPC}"),
            "variants[].reused": Note("Whether it was there already.", False),
            "variants[].seconds": Note("How long it took.", 9.5, "seconds"),
            "variants[].qpc_bytes": Note("Its size.", 98566144, "bytes"),
            "variants[].error": Note("Where it is not there: why.", "The compiler failed: ..."),
            "variants[].exit_code": Note("Where the compiler failed: its exit code.", 255),
        },
    ),
    "status, stop": ("Runs here, and jobs of a cluster.", _STATUS),
    "runs": ("Runs of a folder.", {n: told for n, told in _STATUS.items() if n[:5] == "runs["}),
    "show": (
        "One row of a run.",
        {
            "folder": Note("The run's folder.", f"/home/me/runs/{_RUN}"),
            "row": Note("The [row](rows.md).", {"index": 17}),
            "rendered_prompt": Note("The text that the model was given.", "Why is it so?"),
            "prompt_token_ids": Note("Its tokens.", [2437, 338, 340]),
            "remark": Note("Why these are unknown, or may be others.", ""),
            "history[].session": Note("A session that had the row.", 0),
            "history[].at_s": Note("When, from the session's start.", 3.2, "seconds"),
            "history[].is_final": Note("Whether its row is the one that counts.", True),
            "history[].worker": Note("The card.", "card 3"),
            "history[].attempts": Note("How often it was given to one.", 1),
            "history[].finish_reason": Note("Why it ended.", "stop"),
            "history[].error": Note("Why it has no answer.", None),
        },
    ),
    "devices": (
        "The cards of this machine.",
        {
            "sdk": Note("The SDK.", "emulated SDK 1.20.2"),
            **{f"devices[].{name}": told for name, told in DEVICE.items()},
            "boards": Note("Board -> ids of its cards.", {"QAIC-0001": [0, 1, 2, 3]}),
        },
    ),
    "devices --address": (
        "The cards of a cluster.",
        {
            "nodes[].node": Note("The node, as Ray knows it.", {"address": "10.0.0.2"}),
            "nodes[].host": Note("Its machine.", "node-7"),
            "nodes[].boot_id": Note("The machine's boot: two nodes of one have the same.", "1f2e"),
            "nodes[].sdk_root": Note("Its SDK's folder.", "/opt/qti-aic"),
            "nodes[].sdk": Note("The SDK.", "SDK 1.20.2"),
            "nodes[].emulated": Note("Whether that is the emulated one.", False),
            **{f"nodes[].devices[].{name}": told for name, told in DEVICE.items()},
            "nodes[].held": Note("Card -> who holds it.", {"3": "run mine"}),
            "nodes[].error": Note("Why there are no cards.", ""),
            "problems": Note("What keeps cards from being used.", []),
        },
    ),
    "doctor": (
        "What was looked at. The exit code is 1 where something fails.",
        {
            "ok": Note("Whether nothing fails.", True),
            "checks[].check": Note("What was looked at.", "cards"),
            "checks[].verdict": Note("`ok`, `warn` or `fail`.", "ok"),
            "checks[].says": Note("How it is.", "4 cards are ready"),
            "checks[].remedy": Note("What to do about it.", ""),
            "checks[].node": Note("The machine, on a cluster.", ""),
            "facts": Note("All that is known of each machine.", [{"host": "node-7"}]),
        },
    ),
    "check": (
        "What was found of files. The exit code is 1 where something would be refused.",
        {
            "ok": Note("Whether nothing would be refused.", False),
            "path": Note("What was looked at.", "specializations.json"),
            "artifacts": Note("How many programs or files that is.", 1),
            "sdk_version": Note("The Apps version that counts; empty for any.", "1.20"),
            "sku": Note("The kind of card that counts; empty for any.", "Standard"),
            "findings[].rule": Note("The rule.", "specializations-named"),
            "findings[].grade": Note("`refused` or `remark`.", "refused"),
            "findings[].place": Note("The file.", "specializations.json"),
            "findings[].says": Note("What is wrong.", "Its entries are named ..."),
            "findings[].remedy": Note("What to do.", "Convert it: --convert FOLDER."),
            "findings[].source": Note("Where the rule stands.", "https://github.com/quic/..."),
            "converted[].file": Note("A file that was written.", "specializations.json"),
            "converted[].to": Note("What of it was changed.", "flat entries"),
            "folder": Note("Where they are; null where none was written.", "converted"),
        },
    ),
    "monitoring": (
        "The configuration that was written.",
        {
            "folder": Note("Its folder.", "monitoring"),
            "files": Note("Its files.", ["monitoring/prometheus.yml"]),
            "commands.prometheus": Note("What starts Prometheus.", "prometheus --config..."),
            "commands.grafana": Note("What starts Grafana.", "grafana server ..."),
        },
    ),
    "merge": ("The proof of the whole, which is proof.json of its folder too.", MERGED),
    "compare": (
        "Where two bundles differ first. The exit code is 1 where they do.",
        {
            "equal": Note("Whether they do not differ.", False),
            "executions": Note("Executions that are equal, from the first on.", 3),
            "largest": Note("The largest difference of two numbers up to there.", 0.0),
            "difference": Note("Null where they do not differ.", None),
            "difference.activation": Note(
                "The activation, of outputs of `qaic-runner -a 2`; null where there is one.", None
            ),
            "difference.execution": Note("Number of the execution, from 0.", 3),
            "difference.direction": Note("`input`, `output`, or `number of`.", "output"),
            "difference.tensor": Note("Name of the tensor.", "logits"),
            "difference.element": Note("Index in it; null for the whole tensor.", [0, 0, 17]),
            "difference.first": Note("What the first bundle has.", "1.5"),
            "difference.second": Note("What the second one has.", "1.25"),
        },
    ),
    "key": (
        "A new API key.",
        {
            "name": Note("Whose it is.", "alice"),
            "key": Note("The key. It is kept nowhere.", "qr-..."),
            "line": Note("Its line for a file of keys.", "alice:sha256:9f2c..."),
        },
    ),
    "ray show": (
        "The Ray that is kept.",
        {
            "address": Note("Its address.", "127.0.0.1:6379"),
            "dashboard": Note("Its dashboard.", "http://127.0.0.1:8265"),
            "ways_in": Note("How a person gets in, line by line.", ["http://127.0.0.1:8265"]),
        },
    ),
    "ray env": (
        "Variables by which programs reach it; null stands for one that is to be unset.",
        {
            "RAY_ADDRESS": Note("Its address.", "127.0.0.1:6379"),
            "RAY_API_SERVER_ADDRESS": Note("Its dashboard.", "http://127.0.0.1:8265"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": Note("Ray's word for: this machine only.", "0"),
            "RAY_AUTH_MODE": Note("Whether it wants a token.", "token"),
            "RAY_AUTH_TOKEN_PATH": Note("The file of its token.", "/home/me/.cache/.../token"),
            "RAY_AUTH_TOKEN": Note("Unset, since it would go before the file.", None),
        },
    ),
    "ray stop": ("", {"ended": Note("Whether there was one.", True)}),
    "emulator install": (
        "The SDK that was laid down.",
        {
            "sdk": Note("Its name and version.", "emulated SDK 1.20.2"),
            "root": Note("Its folder.", "/home/me/sdk"),
            "cards": Note("How many cards it has.", 4),
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
