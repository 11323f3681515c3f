"""Run Llama-family models over every Qualcomm Cloud AI 100 card you own, with or without a card.

Importing the package loads nothing heavy: no ray, torch, onnxruntime or transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaic_ray.cluster.ray_data import CardPredictor
    from qaic_ray.data import QAICEngineProcessorConfig, build_processor

__version__ = "0.1.0"
__all__ = ["CardPredictor", "QAICEngineProcessorConfig", "__version__", "build_processor"]


def __getattr__(name: str) -> Any:
    if name == "CardPredictor":
        from qaic_ray.cluster.ray_data import CardPredictor

        return CardPredictor
    if name in ("QAICEngineProcessorConfig", "build_processor"):
        from qaic_ray import data

        return getattr(data, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
