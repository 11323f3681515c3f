"""Runs of many rows: their answers in part files, and the runs of shards joined."""
