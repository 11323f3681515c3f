"""Files of weights: their tensors, models that point at them, and the digest of those."""
