"""All pages of docs/reference/, by their names."""

from __future__ import annotations

from qaic_ray.reference.answers import answers_page
from qaic_ray.reference.commands import commands_page
from qaic_ray.reference.environment import environment_page
from qaic_ray.reference.errors import errors_page, exit_codes_page
from qaic_ray.reference.http import http_page
from qaic_ray.reference.job import job_page
from qaic_ray.reference.markdown import page, table
from qaic_ray.reference.rows import rows_page
from qaic_ray.reference.run_files import events_page, report_page
from qaic_ray.reference.shards import shards_page
from qaic_ray.shipped.job_schema import SCHEMA_NAME, schema_text

ABOUT = {
    "commands.md": ("each command, each of its options", commands_page),
    "job.md": ("each key of a job file", job_page),
    "rows.md": ("fields of prompts files and of answers", rows_page),
    "report.md": ("fields of report.json", report_page),
    "events.md": ("lines of events.jsonl", events_page),
    "shards.md": ("fields of a merge's proof, and of the end mark of part files", shards_page),
    "answers.md": ("what commands print with --json", answers_page),
    "environment.md": ("environment variables", environment_page),
    "exit-codes.md": ("exit codes", exit_codes_page),
    "errors.md": ("what errors say, and what to do", errors_page),
    "http.md": ("routes of the server and their fields", http_page),
}


def pages() -> dict[str, str]:
    """The text of each file, by its name in docs/reference/."""
    made = {name: make() for name, (_, make) in ABOUT.items()}
    return {"index.md": _index(), **made, SCHEMA_NAME: schema_text()}


def _index() -> str:
    rows = [(f"[{name.removesuffix('.md')}]({name})", what) for name, (what, _) in ABOUT.items()]
    rows.append(("[jobs](../../jobs/README.md)", "the jobs that come along"))
    return page(
        "Reference",
        "These pages are made from the code, and a test compares them with it.",
        table(("page", "what it has"), rows),
    )
