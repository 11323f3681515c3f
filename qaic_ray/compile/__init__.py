"""One compiler: variants of a model, built once and kept by content."""
