"""Kernels of the compiled step, written in LLVM's language and made for this processor.

`emit` and `control` are the language, `tiles`, `products`, `rowops` and `attend` what computes,
`interpreter` the program, `native` makes it machine code. llvmlite is needed; `machine` and
`operations` do without.
"""
