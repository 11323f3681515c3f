"""Sequences into slots, slots into steps, and which step goes first: pure."""
