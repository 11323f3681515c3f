"""Documents and folders on disk: read into checked types, written whole or not at all."""
