"""The command line: parse, call one function, print, exit. The only room of typer.

Exit codes: 0 done, 1 some rows or variants failed, 2 the request itself is wrong. stdout carries
results, stderr carries progress. Commands import what they need when they run, so that `--help`
stays quick.
"""

from __future__ import annotations

import sys

from qaic_ray.errors import QaicRayError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point of `qaic-ray`: runs the app; an error of ours is one sentence on stderr."""
    from qaic_ray.cli.commands import app, options

    try:
        app()
    except QaicRayError as error:
        if options.debug:
            raise
        sys.stderr.write(f"qaic-ray: {error}\n")
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.stderr.write("qaic-ray: stopped.\n")
        sys.exit(EXIT_INTERRUPTED)
