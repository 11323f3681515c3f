"""A processor of datasets, and what makes one of a config: the interface of `ray.data.llm`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.api.quiet import LogListener
from qaic_ray.cluster.ray_data import actor_pool
from qaic_ray.data.answering import DATA, INFERENCE_ERROR, CardAnswers
from qaic_ray.data.config import QAICEngineProcessorConfig
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import shown
from qaic_ray.options import EmulatorOptions, ModelOptions
from qaic_ray.pipeline.prepare_step import cores_here, prepare
from qaic_ray.pipeline.request import choose_sdk

if TYPE_CHECKING:
    from qaic_ray.cluster.ray_data import Dataset

RowFunction = Callable[[dict[str, Any]], dict[str, Any]]

STAGE = "CardAnswers"
_CPUS = 0.1  # the card does the work
_BUILDER_KWARGS = frozenset({"chat_template_kwargs"})

_log = logging.getLogger(__name__)


class Processor:
    """Answers a dataset: `preprocess`, the cards, `postprocess`. Nothing runs before it is read.

    Attributes:
        config: as given.
        qpc: the folder of the program that is run.
    """

    def __init__(
        self,
        config: QAICEngineProcessorConfig,
        qpc: Path,
        *,
        preprocess: RowFunction | None = None,
        postprocess: RowFunction | None = None,
        preprocess_map_kwargs: Mapping[str, Any] | None = None,
        postprocess_map_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.qpc = config, qpc
        self._before = wrapped_before(preprocess)
        self._after = wrapped_after(postprocess, with_error=config.should_continue_on_error)
        self._before_kwargs = dict(preprocess_map_kwargs or {})
        self._after_kwargs = dict(postprocess_map_kwargs or {})
        self._kwargs = chat_template_kwargs

    def __call__(self, dataset: Dataset) -> Dataset:
        """The dataset with answers."""
        config = self.config
        least, most = config.pool
        rows = dataset.map(self._before, **self._before_kwargs)
        answered = rows.map_batches(
            CardAnswers,
            fn_constructor_kwargs=self.constructor_kwargs(),
            compute=actor_pool(least, most, config.max_tasks_in_flight_per_actor),
            batch_size=config.batch_size,
            max_concurrency=config.max_concurrent_batches,
            num_cpus=_CPUS,
            resources={"QAIC": config.cards_per_worker},
            runtime_env=config.runtime_env,
        )
        return answered.map(self._after, **self._after_kwargs)

    def constructor_kwargs(self) -> dict[str, Any]:
        """What a worker is made with."""
        config, stage = self.config, self.config.chat_stage
        predictor = {
            "model": config.model_source,
            "qpc": str(self.qpc),
            "sdk": config.sdk,
            "sampling": config.sampling,
            "prefix_reuse": config.prefix_reuse,
            "chat_template": stage.get("chat_template"),
        }
        if config.qpc is not None:  # they are checked; of a program that was made they are its own
            predictor |= {"input_len": config.prompt_len, "ctx_len": config.ctx_len}
        return {
            "predictor": predictor,
            "chat": bool(stage["enabled"]),
            "chat_template_kwargs": stage.get("chat_template_kwargs") or self._kwargs,
            "continue_on_error": config.should_continue_on_error,
            "num_batches": config.max_concurrent_batches,
            "metrics": config.log_engine_metrics,
        }

    def list_stage_names(self) -> list[str]:
        """The stages between preprocess and postprocess: one, which does everything."""
        return [STAGE]

    def log_input_column_names(self) -> None:
        """Log which fields of a row are read."""
        needed = "messages" if self.config.chat_stage["enabled"] else "prompt"
        _log.info("Of a row are read: %s, and sampling_params if it is there.", needed)


def build_processor(  # noqa: PLR0917 - as in ray.data.llm
    config: QAICEngineProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: dict[str, Any] | None = None,
    postprocess_map_kwargs: dict[str, Any] | None = None,
    builder_kwargs: dict[str, Any] | None = None,
) -> Processor:
    """A processor of a config; a program that it names none of is made now, on this machine.

    Args:
        config: how rows are answered.
        preprocess: makes of a row its `messages` or `prompt`, and its `sampling_params`; the fields
            that it leaves out stay.
        postprocess: makes the row of the result of one with its answer. A row without one goes past
            it.
        preprocess_map_kwargs: for `Dataset.map` of the first.
        postprocess_map_kwargs: for that of the other.
        builder_kwargs: `chat_template_kwargs`, for rows that bring none.

    Raises:
        UsageError: for a model, program or SDK that does not fit.
        ExportError: the model could not be exported.
        CompileError: it could not be compiled.
    """
    if not isinstance(config, QAICEngineProcessorConfig):
        raise UsageError(
            f"build_processor takes a QAICEngineProcessorConfig, not a {type(config).__name__}."
        )
    more = dict(builder_kwargs or {})
    if unknown := more.keys() - _BUILDER_KWARGS:
        names = ", ".join(sorted(map(shown, unknown)))
        raise UsageError(
            f"builder_kwargs has {names}; known is {', '.join(_BUILDER_KWARGS)}, and the arguments "
            "of build_processor are given to it."
        )
    return Processor(
        config,
        Path(config.qpc).expanduser().absolute() if config.qpc is not None else _prepared(config),
        preprocess=preprocess,
        postprocess=postprocess,
        preprocess_map_kwargs=preprocess_map_kwargs,
        postprocess_map_kwargs=postprocess_map_kwargs,
        **more,
    )


def wrapped_before(function: RowFunction | None) -> RowFunction:
    """A row as the data column, with what a function makes of it put in."""

    def before(row: dict[str, Any]) -> dict[str, Any]:
        return {DATA: row | (function(row) if function is not None else {})}

    return before


def wrapped_after(function: RowFunction | None, *, with_error: bool) -> RowFunction:
    """What a function makes of an answered row; one that is an error goes past it, whole.

    Args:
        function: the user's.
        with_error: whether a row that is well says so.
    """

    def after(row: dict[str, Any]) -> dict[str, Any]:
        answered: dict[str, Any] = row[DATA]
        if answered[INFERENCE_ERROR]:
            return answered
        result = answered if function is None else function(answered)
        return result | {INFERENCE_ERROR: ""} if with_error else result

    return after


def _prepared(config: QAICEngineProcessorConfig) -> Path:
    listener = LogListener()
    sdk = choose_sdk(config.sdk, EmulatorOptions(), listener)
    shapes = config.shapes
    if shapes.num_cores is None and config.cards_per_worker < 1:
        cores = cores_here(sdk, partitions=round(1 / config.cards_per_worker))
        shapes = shapes.model_copy(update={"num_cores": cores})
    return prepare(ModelOptions(name=config.model_source), shapes, sdk, listener)
