"""One checkpoint: its graph with the KV cache as retained state, its weights, and the proof."""
