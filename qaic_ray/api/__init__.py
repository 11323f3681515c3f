"""The Python interface: `qaic_ray.LLM` in vLLM's names, and the steps of a job as functions."""
