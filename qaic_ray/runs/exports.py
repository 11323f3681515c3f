"""A run's outputs in other programs' formats, made from `outputs.jsonl` when the run is done.

Each file is there whole or not at all, and exporting again gives the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from qaic_ray.files.folders import replacing
from qaic_ray.formats.json_rows import Origin, response_line, token_number
from qaic_ray.formats.tables import write_parquet
from qaic_ray.option_types import OutputFormat
from qaic_ray.runs.delivery import OUTPUTS_NAME
from qaic_ray.runs.journal import disk_errors_end_the_run

PARQUET_NAME = "outputs.parquet"
OPENAI_OUTPUT_NAME = "openai_output.jsonl"
OPENAI_ERROR_NAME = "openai_error.jsonl"


def export_outputs(
    folder: Path,
    output_format: OutputFormat,
    *,
    model: str,
    token_text: Callable[[int], str] = token_number,
) -> tuple[Path, ...]:
    """Write a run's rows once more, in another format; return the files.

    The rows that are there are written: of a run that is still going, those that it has.

    Args:
        folder: the run's.
        output_format: which.
        model: the name of the model that answered, for the OpenAI format.
        token_text: a token's text, for the OpenAI format's logprobs.

    Raises:
        QaicRayError: when the disk refuses.
    """
    with disk_errors_end_the_run(folder):
        if output_format is OutputFormat.PARQUET:
            path = folder / PARQUET_NAME
            with _replacing(path) as stream:
                write_parquet(_rows(folder), stream)
            return (path,)
        created = int((folder / OUTPUTS_NAME).stat().st_mtime)
        return _export_openai(folder, Origin(folder.name, model, created, token_text))


def _export_openai(folder: Path, origin: Origin) -> tuple[Path, ...]:
    paths = folder / OPENAI_OUTPUT_NAME, folder / OPENAI_ERROR_NAME
    with ExitStack() as stack:
        output, errors = (stack.enter_context(_replacing(path)) for path in paths)
        for row in _rows(folder):
            line = json.dumps(response_line(row, origin)) + "\n"
            (errors if "error" in row else output).write(line.encode())
    return paths


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / OUTPUTS_NAME).open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return  # it is being written
            yield json.loads(line)


def _replacing(path: Path) -> AbstractContextManager[BinaryIO]:
    return replacing(path, path.with_name(f".{path.name}.unfinished"))
