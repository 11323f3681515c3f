"""One run: its loop, journal, delivery, result and report."""
