"""`/v1/files` and `/v1/batches`: files that are kept, and batches that survive every death."""
