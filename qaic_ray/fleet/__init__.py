"""A fleet that stays open: takes, streams and cancels prompts at any time."""
