"""The vendor's command-line tools: each module is the command of its name."""
