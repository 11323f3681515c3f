"""The time-outs are values: documented one by one, and named in a report where they are changed."""

from __future__ import annotations

import ast
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

from qaic_ray import timeouts
from qaic_ray.dispatch.policy import Policy
from qaic_ray.timeouts import Timeouts, changed_values


def test_every_time_out_is_in_seconds_and_says_what_it_limits() -> None:
    tree = ast.parse(Path(timeouts.__file__).read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    documented = {
        field.target.id
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    assert documented == {field.name for field in fields(Timeouts)}
    assert all(name.endswith("_s") for name in documented)


def test_only_what_is_not_the_default_is_named() -> None:
    assert changed_values(Timeouts()) == changed_values(Policy()) == {}
    assert changed_values(Timeouts(lock_s=1.0, busy_s=20.0)) == {"lock_s": 1.0}
    assert changed_values(Policy(max_shards=3)) == {"max_shards": 3}
