"""Checkpoints, tokenizers and chat templates: what a model is before it is exported."""
