"""Token selection compiled by numba; numpy is the reference, and goes on without it."""
