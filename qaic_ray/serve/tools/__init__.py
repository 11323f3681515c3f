"""Tools of chat requests, in the form that the model's chat template teaches.

`calling.py` is the door: `support_of` once a model, `read_calling` a request, and what it returns
turns the answer's text, whole or in parts, into messages and deltas with calls.
"""
