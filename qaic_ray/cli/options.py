"""Options that several commands have, and the SDK that `--sdk` names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qaic_ray.documents import user_path

if TYPE_CHECKING:
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.run_step import SdkChoice
    from qaic_ray.sdk import Sdk


def known_path(parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """The callback of options and arguments that are paths: `~` put in, or one sentence."""
    what = parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.name)
    return None if value is None else user_path(value, what)


SdkOption = Annotated[
    str,
    typer.Option("--sdk", help="auto, real, emulated, or an SDK folder (also: $QAIC_RAY_SDK)."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="End stdout with one JSON object on one line.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model-name",
        "--model_name",
        help="Local folder, hub id, .gguf file, or smollm2-135m.",
        show_default=False,
    ),
]


def sdk_choice(name: str, screen: Screen) -> SdkChoice:
    """The SDK of that name here, and what the nodes of a cluster are to look for."""
    from qaic_ray.config import EmulatorPart
    from qaic_ray.pipeline.devices import emulated_cards
    from qaic_ray.pipeline.run_step import SdkChoice

    return SdkChoice(find_sdk(name, screen), name, emulated_cards(EmulatorPart()))


def find_sdk(name: str, screen: Screen) -> Sdk:
    """The SDK of that name, said on the screen."""
    from qaic_ray.config import EmulatorPart
    from qaic_ray.pipeline.devices import choose_sdk

    return choose_sdk(name, EmulatorPart(), screen)
