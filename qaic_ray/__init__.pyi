"""The types of the names of the package; `__init__.py` finds each when it is asked for."""

from qaic_ray.api.async_llm import AsyncLLM, EngineArgs
from qaic_ray.api.async_llm import EngineArgs as AsyncEngineArgs
from qaic_ray.api.functions import compile, export, launch, plan
from qaic_ray.api.llm import LLM
from qaic_ray.api.outputs import (
    CompletionOutput,
    GenerationError,
    Logprob,
    RequestMetrics,
    RequestOutput,
)
from qaic_ray.api.prompts import PromptType, TextPrompt, TokensPrompt
from qaic_ray.api.sampling import RequestOutputKind, SamplingParams, StructuredOutputsParams
from qaic_ray.cluster.ray_data import CardPredictor
from qaic_ray.data import QAICEngineProcessorConfig, build_processor
from qaic_ray.errors import (
    CheckpointError,
    ClusterLost,
    CompileError,
    DeviceError,
    ExportError,
    FleetBusy,
    FleetClosed,
    JobError,
    ParameterError,
    QaicRayError,
    Unfinished,
    UsageError,
)
from qaic_ray.options import Job
from qaic_ray.pipeline.job import Plan
from qaic_ray.runs.report import RunSummary

__version__: str
__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "CardPredictor",
    "CheckpointError",
    "ClusterLost",
    "CompileError",
    "CompletionOutput",
    "DeviceError",
    "EngineArgs",
    "ExportError",
    "FleetBusy",
    "FleetClosed",
    "GenerationError",
    "Job",
    "JobError",
    "Logprob",
    "ParameterError",
    "Plan",
    "PromptType",
    "QAICEngineProcessorConfig",
    "QaicRayError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "RunSummary",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "Unfinished",
    "UsageError",
    "__version__",
    "build_processor",
    "compile",
    "export",
    "launch",
    "plan",
]
