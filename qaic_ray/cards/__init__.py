"""The cards of every node: found, placed, leased."""
