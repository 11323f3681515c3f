"""Number formats of a card: MXFP6 for weights, MXINT8 and float16 for the KV cache."""
