"""The live line, and the log lines in its place."""
