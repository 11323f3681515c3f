"""Columns of the tables that the compiled step reads; every number is an int64.

An operation's row: what it is, where it writes and reads (address and bytes from row to row; 0 for
a constant that all rows share), how many values, which rows, and parameters of its own (`P0`...).
"""

# Operations' columns.
KIND, OUT, OUT_STRIDE, IN, IN_STRIDE, OTHER, OTHER_STRIDE, COUNT, DOMAIN = range(9)
P0, P1, P2, P3, P4, P5, P6, P7, P8, P9, P10 = range(9, 20)
NUM_COLUMNS = 20

# Kinds of operations on rows, with their parameters.
ADD = 0
MULTIPLY = 1
NORM = 2  # bits of epsilon, groups of a row (COUNT is one group's width)
SILU_TIMES = 3
QUANTIZE = 4  # K, scales, sums, blocks, planes
ROTATE = 5  # cosines, sines, heads, dim
ROUND_HALF = 6
ROUND_MXINT8 = 7
STORE = 8  # cache, bytes of a slot, bytes of a head, heads, dim, bytes of a number
EMBED = 9  # whether the table is float16
SELECT = 10
SCALE = 11  # bits of the factor
SILU = 12
SIGMOID = 13
ARGMAX = 14
# Kinds with a phase of their own.
# weight, kind, tiles, K, panels, planes, scales, sums, bytes of a panel, rows that take it packed
PRODUCT = 20
# keys, values, bytes of a slot, of a head, heads, kv heads, dim, factor, ctx_len, bytes a number,
# how many positions a token sees (0: all up to its own)
ATTEND = 21

# Kinds of weights.
MXFP6, FLOAT16, FLOAT32 = range(3)

# Phases' columns and kinds.
PHASE_KIND, FIRST, LAST, TASKS, BLOCK, ROWS = range(6)
NUM_PHASE_COLUMNS = 6
ROWWISE, PRODUCTS, ATTENTION = range(3)

# Rows: every token of an inference, or those whose logits are asked for. SOURCES are the tokens
# that the rows of the second are.
ALL, KEPT = range(2)
IDS, POSITIONS, SLOTS, SOURCES = range(4)

ENTRY = "qaic_step"
"""The compiled step's name."""
COUNTER_BYTES = 128
"""Of a phase: what was taken, and what is done, each in a cache line of its own."""
SCRATCH_BYTES = 1 << 15
"""Of a thread's own memory, for what products unpack."""
