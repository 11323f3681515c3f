"""Reads prompts in and writes rows out, in each format."""
