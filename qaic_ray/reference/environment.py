"""The page of environment variables."""

from __future__ import annotations

from qaic_ray.environment import GROUPS
from qaic_ray.reference.markdown import code, page, section, table


def environment_page() -> str:
    """docs/reference/environment.md."""
    return page(
        "Environment variables",
        "An option on the command line, or a key of a job, goes before a variable.",
        *(
            section(
                title,
                table(
                    ("variable", "meaning", "where it is not set", "example"),
                    (
                        (code(v.name), v.meaning, v.default, code(f"{v.name}={v.example}"))
                        for v in variables
                    ),
                ),
            )
            for title, variables in GROUPS.items()
        ),
    )
