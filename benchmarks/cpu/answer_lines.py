"""A contender's side of `contender.py`: JSON requests on stdin, answers on stdout.

Needs nothing but Python, as it runs in the peers' environments too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def answer_lines(calls: Mapping[str, Callable[..., Any]]) -> None:
    """Answer `{"do": NAME, ...}` by the call of that name until stdin ends.

    What libraries print goes to stderr. An exception is the answer `{"error": TEXT}`, and the next
    request is read.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"answer": calls[request.pop("do")](**request)}
        except Exception as error:  # noqa: BLE001  # of any library; who asked raises it anew
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
