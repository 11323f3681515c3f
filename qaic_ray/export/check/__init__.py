"""An exported graph held against PyTorch: the same prompts, differences, float16 headroom."""
