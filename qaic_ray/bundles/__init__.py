"""Bundles: executions of a program, dumped in the vendor's batch form, and two of them compared."""
