"""The report of a run: figures from its rows and events, the page, and comparisons of runs."""
