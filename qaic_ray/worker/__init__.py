"""One card's work without Ray: prompts in, rows out."""
