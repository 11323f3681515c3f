"""The command line: parse, call one function, print, exit. The only room of typer.

stdout carries results, stderr carries progress; exit codes are `qaic_ray.errors.ExitCode`. Commands
import what they need when they run, so that `--help` stays quick.
"""

from __future__ import annotations

import sys

from qaic_ray import interruption
from qaic_ray.cli import streams
from qaic_ray.cli.ending import end


def main() -> None:
    """Entry point of `qaic-ray`: runs the app; whatever goes wrong is one sentence on stderr."""
    streams.guard()
    interruption.listen()
    debug = False
    try:
        from qaic_ray.cli.commands import app, options

        try:
            app()
        finally:
            debug = options.debug
            sys.stdout.flush()
    except SystemExit:
        if interruption.received() is None:
            raise
        end(KeyboardInterrupt(), debug=debug)  # typer heard it, while it was parsing
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - here they all end
        end(error, debug=debug)
