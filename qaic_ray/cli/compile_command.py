"""`qaic-ray compile`: its options, and the request that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qaic_ray.cli.arguments import given_once, number_groups, numbers, words
from qaic_ray.cli.options import JsonOption, SdkOption, find_sdk, known_path
from qaic_ray.contract import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_CORES,
    DEFAULT_CTX_LEN,
    DEFAULT_PRECISION,
    DEFAULT_PROMPT_LEN,
)

if TYPE_CHECKING:
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.compile_step import CompileRequest

SHAPES = {
    "batch_size": "--batch-size",
    "prompt_len": "--prompt-len",
    "ctx_len": "--ctx-len",
    "num_speculative_tokens": "--num-speculative-tokens",
    "comp_ctx_lengths": "--comp-ctx-lengths",
}
"""The options in whose place a specializations.json may stand."""

ModelDirArgument = Annotated[
    Path, typer.Argument(callback=known_path, help="Folder that export made (<base>-kv).")
]
OutputOption = Annotated[
    Path, typer.Option(callback=known_path, help="Folder that gets one folder a variant.")
]
SpecializationsOption = Annotated[
    Path | None,
    typer.Option(
        callback=known_path,
        help="A specializations.json, instead of the five options below; the one of this folder is "
        "used where none of them is given.",
    ),
]
BatchOption = Annotated[
    str | None,
    typer.Option(
        *("--batch-size", "--batch_size"),
        help="Rows, or slots; lists: 1,8.",
        show_default=str(DEFAULT_BATCH_SIZE),
    ),
]
PromptLenOption = Annotated[
    str | None,
    typer.Option(
        *("--prompt-len", "--prompt_len"),
        help="Prefill; lists: 32,64; both in one QPC: 32+64.",
        show_default=str(DEFAULT_PROMPT_LEN),
    ),
]
CtxLenOption = Annotated[
    str | None,
    typer.Option(
        *("--ctx-len", "--ctx_len"),
        help="Tokens of a context; lists: 512,2048.",
        show_default=str(DEFAULT_CTX_LEN),
    ),
]
SpeculatedOption = Annotated[
    int | None,
    typer.Option("--num-speculative-tokens", min=0, help="Guessed ahead in a decode step."),
]
ContextsOption = Annotated[
    str | None, typer.Option("--comp-ctx-lengths", help="Contexts to compute with: 512,1024.")
]
CoresOption = Annotated[
    str | None, typer.Option("--num-cores", "--num_cores", help="NSPs; lists: 7,14.")
]


def compile(  # the recipe's word
    context: typer.Context,
    model_dir: ModelDirArgument,
    precision_argument: Annotated[
        str | None, typer.Argument(metavar="[mx6|fp16|fp32]", show_default=DEFAULT_PRECISION)
    ] = None,
    cores_argument: Annotated[
        str | None, typer.Argument(metavar="[NSP]", show_default=str(DEFAULT_CORES))
    ] = None,
    specializations: SpecializationsOption = None,
    batch_size: BatchOption = None,
    prompt_len: PromptLenOption = None,
    ctx_len: CtxLenOption = None,
    num_speculative_tokens: SpeculatedOption = None,
    comp_ctx_lengths: ContextsOption = None,
    num_cores: CoresOption = None,
    precision: Annotated[str | None, typer.Option(help="Lists: mx6,fp16.")] = None,
    output: OutputOption = Path("qpc"),
    jobs: Annotated[int | None, typer.Option(help="Compiles at once.", min=1)] = None,
    sdk: SdkOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compile a model into QPCs: every combination of the lists, in parallel, each built once."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.compile_step import compile_step

    screen = Screen()
    request = _asked(context.params, screen)
    outcomes = compile_step(request, find_sdk(sdk, screen), screen)
    screen.compiled_all(outcomes, as_json=as_json)


def _asked(given: Mapping[str, Any], screen: Screen) -> CompileRequest:
    """The request that the options make."""
    from qaic_ray.pipeline.compile_step import CompileRequest, specializations_file

    file = specializations_file(
        given["specializations"],
        [option for name, option in SHAPES.items() if given[name] is not None],
    )
    if file is not None and file != given["specializations"]:
        screen.remark(f"{file} of this folder says the shapes, as in the published recipe.")
    precision = given_once(given["precision_argument"], given["precision"], "precision")
    cores = given_once(given["cores_argument"], given["num_cores"], "NSP")
    return CompileRequest(
        model_dir=given["model_dir"],
        precisions=words(_or(precision, DEFAULT_PRECISION)),
        num_cores=numbers(_or(cores, DEFAULT_CORES), "NSP"),
        batch_sizes=numbers(_or(given["batch_size"], DEFAULT_BATCH_SIZE), "--batch-size"),
        prompt_lens=number_groups(_or(given["prompt_len"], DEFAULT_PROMPT_LEN), "--prompt-len"),
        ctx_lens=numbers(_or(given["ctx_len"], DEFAULT_CTX_LEN), "--ctx-len"),
        num_speculative_tokens=given["num_speculative_tokens"] or 0,
        comp_ctx_lengths=(
            ()
            if given["comp_ctx_lengths"] is None
            else numbers(given["comp_ctx_lengths"], "--comp-ctx-lengths")
        ),
        specializations=file,
        store=given["output"],
        parallel=given["jobs"],
    )


def _or(text: str | None, default: object) -> str:
    return str(default) if text is None else text
