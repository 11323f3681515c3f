"""The words of the command line: options as flags, help pages, completion, and mistakes."""
