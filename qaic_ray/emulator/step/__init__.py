"""One decode or prefill step of a lowered graph as a compiled program, for any rows at once.

`fuse` reads the graph, `schedule` orders it, `runner` gives it memory and `team` its threads; what
is compiled is in `kernels`.
"""
