"""Run Llama-family models over every Qualcomm Cloud AI 100 card you own, with or without a card.

Importing the package loads nothing heavy: no ray, torch, onnxruntime or transformers.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
