"""`compile-report.json` beside the program: what a compile did and did not do, as data."""

from __future__ import annotations

import json
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

FILE_NAME = "compile-report.json"


class Report(NamedTuple):
    """What there is to say of a finished build.

    `not_lowered` is the reason why the graph runs as it is, if it does; `quantization` says how the
    program was quantized, None where it was not; `external_weights` are the files of a checkpoint
    that weights were read from.
    """

    warnings: List[str]
    not_lowered: Optional[str]
    quantization: Optional[Dict[str, Any]] = None
    external_weights: Sequence[str] = ()


def write(path: str, facts: Dict[str, Any], report: Report, unheeded: Sequence[str]) -> None:
    """Write the report: what was compiled, by name, and the options that had no effect."""
    document = dict(facts)
    document["options_without_effect"] = list(unheeded)
    document["warnings"] = report.warnings
    document["not_lowered"] = report.not_lowered
    document["quantization"] = report.quantization
    document["external_weights"] = list(report.external_weights)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
