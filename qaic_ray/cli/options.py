"""Options that several commands have, and the SDK that `--sdk` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qaic_ray.cli.screen import Screen
    from qaic_ray.sdk import Sdk

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


def find_sdk(name: str, screen: Screen) -> Sdk:
    """The SDK of that name, said on the screen."""
    from qaic_ray.config import EmulatorPart
    from qaic_ray.pipeline.devices import choose_sdk

    return choose_sdk(name, EmulatorPart(), screen)
