"""The pages of a run's report.json and events.jsonl: each field with its meaning."""

from __future__ import annotations

from collections.abc import Mapping

from qaic_ray.reference.markdown import Fields, Note, field_table, page, section, table
from qaic_ray.report.comparison import COMPARED

_HISTOGRAM = "Bins of equal width: `edges`, one more than bins, and `counts`."
_QUANTILES = "`count`, `p50_s`, `p90_s`, `p99_s` and `bins`, whose `edges` have one ratio."
_SHAPE = {"edges": [0.0, 0.05, 0.1], "counts": [20, 310]}
_LENGTHS = {"edges": [0, 25, 50], "counts": [120, 210]}
_LATENCY = {"count": 330, "p50_s": 0.07, "p90_s": 0.09, "p99_s": 0.1, "bins": _SHAPE}
_EVENT = {"at": 1764396403.0, "event": "worker_ready", "worker": "card 0"}
_BUILD = {"name": "smollm2-135m-kv-...", "seconds": 9.5, "reused": False}
_UNIX = "Unix time, seconds"

COUNTS: Fields = {
    "rows": Note("Rows that have an answer or an error.", 330),
    "failed_rows": Note("Those without an answer.", 1),
    "cut_rows": Note("Those that ended at their most tokens, or with a full context.", 13),
    "prompt_tokens": Note("Tokens of all prompts.", 38353),
    "generated_tokens": Note("Tokens of all answers. An EOS counts once, nothing after it.", 62210),
}
ENGINE: Fields = {
    "occupancy": Note("Share of decode steps' slots that held a row; null without steps.", 0.875),
    "reused_tokens": Note("Prompt tokens that a slot held already.", 512),
    "drafted_tokens": Note("Tokens that were guessed ahead.", 1200),
    "accepted_tokens": Note("Those of them that were right.", 960),
    "acceptance": Note("Their share; null where nothing was drafted.", 0.8),
    "tokens_per_row_step": Note("Tokens that a row got from a decode step; 1 without drafts.", 2.4),
}
REPORT: Fields = {
    "format": Note("Version of this document.", 1),
    "job": Note("Name of the job, or `run`.", "mine"),
    "model": Note("The model, as it was named.", "smollm2-135m"),
    "qpc": Note("Name of the program.", "smollm2-135m-kv-64pl-512cl-14c-8BS-mx6"),
    "sdk": Note("The SDK and its version.", "emulated SDK 1.20.2"),
    "emulated": Note("Whether that is the emulated one. Its figures are never a card's.", True),
    "folder": Note("The run's folder.", "runs/mine-20261129-090500"),
    "state": Note("`done`, `running`, or `unfinished`: nobody works on it, it can go on.", "done"),
    **COUNTS,
    "seconds": Note(
        "From the first shard that was handed out to the last row that came, on the driver's "
        "clock. Earlier sessions are added.",
        64.1,
        "seconds",
    ),
    "tokens_per_s": Note(
        "The merged rate: generated tokens over `seconds`. It is no sum or mean of rates.",
        970.7,
        "tokens/s",
    ),
    "runmodel_tokens_per_s": Note(
        "The rate as the recipe's runModel.py counts it; null for programs that it cannot run.",
        312.5,
        "tokens/s",
    ),
    "ttft_median_s": Note("Median time from the engine to the first token.", 0.21, "seconds"),
    "ttft_p90_s": Note("The time that 90 of 100 rows keep.", 0.42, "seconds"),
    **ENGINE,
    "settings": Note("Time-outs and rules that are not the defaults.", {"stall_s": 120}),
    "error": Note("Why the run is not complete, in a sentence; null where it is.", None),
    "goes_on": Note("Whether the run ended early and can be resumed.", False),
    "proof": Note("The proof that no row is missing or twice; null before the end.", None),
    "proof.rows_in": Note("Rows of the input.", 330),
    "proof.rows_ok": Note("Rows with an answer.", 329),
    "proof.rows_error": Note("Rows with an error. Together they are `rows_in`.", 1),
    "proof.inputs_sha256": Note("Digest over the rows of the input, in order.", "9f2c..."),
    "proof.outputs_sha256": Note("Digest of the bytes of outputs.jsonl.", "5d0a..."),
    "proof.complete": Note("Whether the input was read to its end, and was one input.", True),
    "workers[].name": Note("A card, part of a card, or group of cards.", "card 0"),
    "workers[].device_ids": Note("Ids of its cards.", [0]),
    "workers[].slots": Note("Rows that it answers side by side.", 8),
    "workers[].load_s": Note("Time to load its program.", 5.5, "seconds"),
    **{f"workers[].{name}": told for name, told in COUNTS.items()},
    "workers[].ttft_median_s": Note("As above, of its rows.", 0.21, "seconds"),
    "workers[].prefill_steps": Note("Steps that read prompts.", 96),
    "workers[].prefill_s": Note("Time in them.", 4.2, "seconds"),
    "workers[].decode_steps": Note("Steps that made tokens.", 2000),
    "workers[].decode_tokens": Note("Tokens that came from them.", 14000),
    "workers[].decode_s": Note("Time in them.", 40.0, "seconds"),
    **{f"workers[].{name}": told for name, told in ENGINE.items()},
    "workers[].decode_tokens_per_s": Note(
        "Tokens from decode steps over the time in them.", 350.0, "tokens/s"
    ),
    "workers[].runmodel_tokens_per_s": Note("As above.", 312.5, "tokens/s"),
    "workers[].error": Note("The last error of the card; null where it had none.", None),
    "workers[].losses": Note("How often its process was lost, or it did not open.", 0),
    "workers[].ready_at_end": Note("Whether it was there at the end.", True),
    "ttft_s_histogram": Note(f"Times to the first token. {_HISTOGRAM}", _SHAPE, "seconds"),
    "generated_tokens_histogram": Note(f"Lengths of answers. {_HISTOGRAM}", _LENGTHS, "tokens"),
    "prompt_tokens_histogram": Note(f"Lengths of prompts. {_HISTOGRAM}", _LENGTHS, "tokens"),
    "started_at": Note("When the first session began.", 1764396395.0, _UNIX),
    "first_row_at": Note("When the first row was begun.", 1764396401.5, _UNIX),
    "last_row_at": Note("When the last row ended.", 1764396575.1, _UNIX),
    "finish_reasons": Note("Reason of an end -> rows.", {"stop": 316, "length": 13}),
    "attempts": Note("Attempts -> rows that took so many.", {"1": 328, "2": 2}),
    "errors[].class": Note("Class of an error: see [rows](rows.md).", "refused"),
    "errors[].rows": Note("Rows with such an error.", 1),
    "errors[].sentences[].text": Note("What they say.", "The prompt is empty."),
    "errors[].sentences[].first_row": Note("Index of the first row that says it.", 299),
    "errors[].sentences[].rows": Note("Rows that say it.", 1),
    "slowest_rows[].index": Note("A row that took long.", 79),
    "slowest_rows[].id": Note("Its id.", "q-79"),
    "slowest_rows[].worker": Note("Its card.", "card 0"),
    "slowest_rows[].end_to_end_s": Note("From its coming to the card to its end.", 14.2, "seconds"),
    "slowest_rows[].queue_s": Note("Of these, before its first step.", 1.1, "seconds"),
    "slowest_rows[].ttft_s": Note("From the engine to its first token.", 0.4, "seconds"),
    "slowest_rows[].decode_s": Note("From its first token to its last.", 12.7, "seconds"),
    "slowest_rows[].prompt_tokens": Note("Tokens of its prompt.", 251),
    "slowest_rows[].generated_tokens": Note("Tokens of its answer.", 512),
    "slowest_rows[].attempts": Note("How often it was given to a card.", 1),
    "slowest_rows[].ended_at": Note("When it ended.", 1764396426.5, _UNIX),
    "timeline.bucket_s": Note("Width of a bucket of time.", 0.25, "seconds"),
    "timeline.times": Note("Where each bucket begins.", [1764396403.0], _UNIX),
    "timeline.workers[].name": Note("A card.", "card 0"),
    "timeline.workers[].tokens": Note("Tokens that it made in each bucket.", [14.7, 53.6]),
    "timeline.workers[].slots_used": Note("Slots that it used in each bucket.", [8.0, 7.5]),
    "timeline.stretches": Note(
        "From and to of each time in which cards were busy.", [[1764396402.7, 1764396453.5]], _UNIX
    ),
    "ran": Note(
        "What ran: see below.",
        {"qaic_ray": "0.9.0"},
    ),
    "sessions[].from": Note("When a session began.", 1764396395.0, _UNIX),
    "sessions[].to": Note("When it ended, or was killed.", 1764396453.5, _UNIX),
    **{
        f"latency.{name}": Note(f"{what} {_QUANTILES}", _LATENCY, "seconds")
        for name, what in {
            "ttft_engine": "From the engine to the first token.",
            "ttft_queue": "From the card's queue to the first token.",
            "queue": "In the card's queue.",
            "time_per_output_token": "Mean time of a token of a row after its first.",
            "end_to_end": "From the card's queue to the last token.",
            "inter_token": "From one step that gave a row tokens to the next.",
        }.items()
    },
    "event_counts": Note("Card -> event -> how often.", {"card 0": {"worker_ready": 1}}),
    "events": Note("As in events.jsonl; of many the first and last.", [_EVENT]),
    "compiles[].name": Note("A program that was compiled for the job.", "smollm2-135m-kv-..."),
    "compiles[].seconds": Note("How long that took.", 1312.5, "seconds"),
    "compiles[].reused": Note("Whether it was there already.", False),
    "energy": Note("Energy of the boards; null where no card told of any.", None),
    "energy.joules": Note("Energy of all boards.", 18234.5, "joules"),
    "energy.seconds": Note("Time for which the power is known.", 64.1, "seconds"),
    "energy.mean_watts": Note("Mean power.", 284.5, "watts"),
    "energy.joules_per_token": Note("Energy over generated tokens.", 0.29, "joules"),
    "energy.boards": Note("Boards that told of their power.", 4),
    "energy.simulated": Note("Whether the readings are the emulated SDK's.", True),
    "missing": Note("A sentence for each thing that the report cannot tell.", ["The run goes on."]),
}
"""Keys of report.json."""

RAN: Fields = {
    "qaic_ray": Note("Version of qaic-ray.", "0.9.0"),
    "ray": Note("Version of Ray.", "2.60.0"),
    "python": Note("Version of Python.", "3.11.2"),
    "sdk": Note("The SDK and its versions.", "emulated SDK 1.20.2"),
    "numerics": Note("How emulated cards computed; null for real ones.", "exact"),
    "host": Note("Name of the machine.", "node-7"),
    "cpus": Note("Its CPUs.", 64),
    "pid": Note("The process of the driver.", 4242),
    "command": Note("The command line.", "qaic-ray launch mine.yaml"),
    "model": Note("The model.", "smollm2-135m"),
    "qpc": Note("Name of the program.", "smollm2-135m-kv-64pl-512cl-14c-8BS-mx6"),
    "qpc_sha256": Note("Digest of the program.", "5f5f..."),
    "precision": Note("How its weights are kept.", "mx6"),
    "num_cores": Note("Its NSPs.", 14),
    "compile_s": Note("How long the compiler took.", 9.5, "seconds"),
    "model_sha256": Note("Digest of the ONNX model.", "a7a7..."),
    "specializations": Note("Its shapes.", [{"batch_size": "8", "seq_len": "1"}]),
    "resumed_with": Note("Of a run that went on: the last command line.", "qaic-ray run --resume"),
}
_BEGUN = {name: told for name, told in RAN.items() if name != "resumed_with"}
EVENTS: Mapping[str, tuple[str, Fields]] = {
    "session_started": (
        "A process began to work on the run. What is known of the program stands beside it.",
        {**_BEGUN, "compiles": Note("Programs that were compiled for the job.", [_BUILD])},
    ),
    "worker_ready": (
        "A card has loaded the program.",
        {
            "worker": Note("The card.", "card 3"),
            "slots": Note("Rows that it answers side by side.", 8),
            "device_ids": Note("Ids of its cards.", [3]),
            "load_s": Note("Time to load.", 5.5, "seconds"),
            "sdk": Note("The SDK there.", "emulated SDK 1.20.2"),
            "shapes": Note("Tokens of a prefill, and of a context.", [128, 4096]),
            "incarnation": Note("How often it was opened before.", 0),
        },
    ),
    "worker_lost": (
        "A card's process died, or gave no sign.",
        {"worker": Note("The card.", "card 3"), "error": Note("Why.", "its process died")},
    ),
    "worker_retired": (
        "A card that failed again and again is closed.",
        {"worker": Note("The card.", "card 3"), "error": Note("Why.", "QS_ERROR")},
    ),
    "worker_reopening": (
        "A card is opened anew.",
        {"worker": Note("The card.", "card 3"), "incarnation": Note("How often so far.", 1)},
    ),
    "worker_given_up": (
        "A card is left out for the rest of the run.",
        {"worker": Note("The card.", "card 3"), "error": Note("Why.", "it does not open")},
    ),
    "shard_failed": (
        "A card refused work that another one may do.",
        {"worker": Note("The card.", "card 3"), "error": Note("Why.", "QS_BUSY")},
    ),
    "retried": (
        "Prompts are given out again.",
        {
            "worker": Note("The card that gets them.", "card 1"),
            "attempt": Note("The how-manieth attempt it is.", 2),
            "prompts": Note("How many prompts.", 8),
        },
    ),
    "power": (
        "A reading of the boards' power.",
        {"watts": Note("Board -> watts.", {"B0000": 40.0}, "watts")},
    ),
    "session_ended": (
        "The process ended by itself. A killed one leaves no such line.",
        {
            "error": Note("Why early; null where it was not.", None),
            "engines": Note("Card -> counts of its steps; none if it was stopped.", {"card 0": {}}),
        },
    ),
}
"""Events of events.jsonl, and the keys of each beside `at` and `event`."""

COMPARISON: Fields = {
    "runs[].name": Note("Name of the run.", "mine-20261129-090500"),
    "runs[].folder": Note("Its folder.", "runs/mine-20261129-090500"),
    "runs[].job": Note("Its job.", "mine"),
    "runs[].state": Note("`done`, `running` or `unfinished`.", "done"),
    "runs[].emulated": Note("Whether cards were emulated.", True),
    "runs[].cards": Note("How many cards.", 4),
    "runs[].figures": Note(
        f"Figures by their keys in report.json: {', '.join(figure.key for figure in COMPARED)}.",
        {"tokens_per_s": 970.7},
    ),
    "runs[].missing": Note("What the run's report cannot tell.", ["The run goes on."]),
    "differences": Note("What is not the same: name -> value of each.", {"cards": ["4", "8"]}),
}


def report_page() -> str:
    """docs/reference/report.md."""
    return page(
        "report.json",
        "A run that ends writes `report.json` into its folder. `qaic-ray report RUN` makes it "
        "anew, also of a run that goes on. `--json` prints it. `a.b` is the key `b` of the object "
        "`a`; `a[].b` is the key `b` of each object of the list `a`.",
        "A figure of the emulated SDK is the speed of the machine that computed it. It is never a "
        "card's.",
        field_table(REPORT),
        section(
            "ran",
            "What the last session was, and its program.",
            field_table(RAN),
        ),
        section(
            "report of several runs",
            "`qaic-ray report RUN RUN --json` prints this in its place.",
            field_table(COMPARISON),
        ),
    )


def events_page() -> str:
    """docs/reference/events.md."""
    about = {
        "at": Note("When it happened, by the driver's clock.", 1764396395.0, _UNIX),
        "event": Note("What happened.", "worker_ready"),
    }
    all_ = [(name, meaning, fields) for name, (meaning, fields) in EVENTS.items()]
    return page(
        "events.jsonl",
        "A run writes a line of JSON into `events.jsonl` of its folder for each thing that happens "
        "to its cards. Each session adds to the file. Every line has these two keys.",
        field_table(about),
        section("Events", table(("event", "meaning"), ((f"[{n}](#{n})", m) for n, m, _ in all_))),
        *(section(name, meaning, field_table(fields)) for name, meaning, fields in all_),
    )
