"""One decode or prefill step of a lowered graph as a compiled program, for any rows at once.

`fuse` reads the graph, `schedule` orders it, `runner` gives it memory, `interpreter` is what numba
compiles. numba is needed for the last two only.
"""
