"""Datasets of Ray Data answered on cards, in the form of `ray.data.llm`.

    from qaic_ray.data import QAICEngineProcessorConfig, build_processor

A program that was written for `ray.data.llm` changes this import and its config: see
docs/how-to/ray-data.md.
"""

from __future__ import annotations

from qaic_ray.data.config import QAICEngineProcessorConfig
from qaic_ray.data.processor import Processor, build_processor

__all__ = ["Processor", "QAICEngineProcessorConfig", "build_processor"]
