"""Run Llama-family models over every Qualcomm Cloud AI 100 card you own, with or without a card.

    import qaic_ray

    with qaic_ray.LLM("smollm2-135m") as llm:
        outputs = llm.generate(["The capital of France is"], qaic_ray.SamplingParams(max_tokens=8))

Importing the package loads nothing heavy: no ray, torch, onnxruntime or transformers. Each name is
found where it stands when it is first asked for; `__init__.pyi` has their types. How they are used:
docs/how-to/python.md.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
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

_ROOMS = {
    "api.async_llm": ("AsyncLLM", "EngineArgs"),
    "api.functions": ("launch", "plan"),
    "api.llm": ("LLM",),
    "api.outputs": (
        *("CompletionOutput", "GenerationError", "Logprob", "RequestMetrics", "RequestOutput"),
    ),
    "api.prompts": ("PromptType", "TextPrompt", "TokensPrompt"),
    "api.sampling": ("RequestOutputKind", "SamplingParams", "StructuredOutputsParams"),
    "cluster.ray_data": ("CardPredictor",),
    "data": ("QAICEngineProcessorConfig", "build_processor"),
    "errors": (
        *("CheckpointError", "ClusterLost", "CompileError", "DeviceError", "ExportError"),
        *("FleetBusy", "FleetClosed", "JobError", "ParameterError", "QaicRayError"),
        *("Unfinished", "UsageError"),
    ),
    "options": ("Job",),
    "pipeline.job": ("Plan",),
    "runs.report": ("RunSummary",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
_CALLED = ("compile", "export")
"""Functions that have the name of a room, which can be called (`called_room.py`)."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _CALLED:
        return import_module(f"{__name__}.{name}")
    if name == "AsyncEngineArgs":  # vLLM has two, which are the same here
        name = "EngineArgs"
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
