"""The reference pages of docs/reference/, made from the code. `scripts/reference` writes them.

What people read of an option, a variable or an error stands beside it in the code. What they read
of a field of a document stands here, where a test compares it with documents that were made.
"""
