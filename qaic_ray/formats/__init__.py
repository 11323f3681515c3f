"""Prompt formats in, row formats out."""
