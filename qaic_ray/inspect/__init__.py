"""Looks at run folders from outside: how far a run is, who works on it, what became of a row."""
