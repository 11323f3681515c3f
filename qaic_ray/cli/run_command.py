"""`qaic-ray run`: its options, and the request that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qaic_ray.cli.arguments import chosen, device_ids, numbers
from qaic_ray.cli.options import JsonOption, ModelOption, SdkOption, find_sdk
from qaic_ray.errors import RowError, UsageError
from qaic_ray.sampling_params import FIELDS, SamplingParams


def _option(panel: str, name: str, text: str, **how: Any) -> Any:
    """An option, which the old scripts' spelling names too: `--top-k` and `--top_k`."""
    spellings = dict.fromkeys([name, "--" + name.removeprefix("--").replace("-", "_")])
    return typer.Option(*spellings, help=text, rich_help_panel=panel, **how)


PROMPTS = "Prompts"
QpcOption = Annotated[Path, typer.Option(help="Folder of a compiled variant.", show_default=False)]
DevicesOption = Annotated[
    str, typer.Option("--device-id", "--device_id", help="Cards: 0,1,2,3 or all.")
]
PromptOption = Annotated[
    str | None, _option(PROMPTS, "--prompt", r"Prompts separated by |; \| is a pipe of the text.")
]
PromptsFileOption = Annotated[
    str | None,
    _option(
        PROMPTS, "--prompts-file", "Lines of text; .jsonl: prompt or messages a line; - for stdin."
    ),
]
ChatOption = Annotated[
    bool, _option(PROMPTS, "--chat", "Put each prompt into the model's chat template.")
]
SystemOption = Annotated[
    str | None, _option(PROMPTS, "--system", "With --chat: the system message.")
]

SAMPLING = "Sampling (a JSONL row's own fields go first)"
TemperatureOption = Annotated[
    float | None, _option(SAMPLING, "--temperature", "0 is greedy.", show_default="0")
]
TopKOption = Annotated[int | None, _option(SAMPLING, "--top-k", "Of the k likeliest tokens.")]
TopPOption = Annotated[
    float | None,
    _option(SAMPLING, "--top-p", "Of the likeliest tokens that together are this probable."),
]
MinPOption = Annotated[
    float | None,
    _option(SAMPLING, "--min-p", "Of tokens at least this many times as likely as the likeliest."),
]
RepetitionOption = Annotated[
    float | None,
    _option(SAMPLING, "--repetition-penalty", "Over 1: shun tokens of prompt and answer."),
]
PresenceOption = Annotated[
    float | None,
    _option(SAMPLING, "--presence-penalty", "Over 0: shun tokens that the answer has."),
]
FrequencyOption = Annotated[
    float | None,
    _option(SAMPLING, "--frequency-penalty", "Over 0: the same, for each time it has them."),
]
SeedOption = Annotated[
    int | None, _option(SAMPLING, "--seed", "One seed for every row.", show_default="by --run-seed")
]
RunSeedOption = Annotated[
    int | None,
    _option(
        SAMPLING,
        "--run-seed",
        "What each row's own seed is made from; see seed in a run folder's job.yaml.",
        min=0,
        show_default="drawn",
    ),
]
NOption = Annotated[int | None, _option(SAMPLING, "--n", "Answers to each prompt.")]
LogprobsOption = Annotated[
    int | None,
    _option(SAMPLING, "--logprobs", "Give each token's, and those of so many likeliest."),
]

DRAFTS = "Speculative decoding (a QPC of --num-speculative-tokens)"
DraftsOption = Annotated[
    str, _option(DRAFTS, "--speculate", "auto, none or prompt-lookup; the text is the same.")
]
DraftQpcOption = Annotated[
    Path | None,
    _option(DRAFTS, "--draft-qpc", "Folder of a smaller model's QPC, to run beside the other."),
]

END = "Where an answer ends"
GenerationLenOption = Annotated[
    int | None,
    _option(END, "--generation-len", "Most tokens of an answer.", min=1, show_default="context"),
]
MinTokensOption = Annotated[int | None, _option(END, "--min-tokens", "No answer is shorter.")]
StopOption = Annotated[
    list[str] | None, _option(END, "--stop", "A text that ends an answer; may be repeated.")
]
StopIdsOption = Annotated[
    str | None, _option(END, "--stop-token-ids", "Tokens that end an answer, beside EOS: 13,198.")
]
IgnoreEosOption = Annotated[bool, _option(END, "--ignore-eos", "Go on after EOS.")]

CHECKS = "Checks"
InputLenOption = Annotated[
    int | None, _option(CHECKS, "--input-len", "Must be what the QPC was compiled for.")
]
CtxLenOption = Annotated[
    int | None, _option(CHECKS, "--ctx-len", "Must be what the QPC was compiled for.")
]
OutputOption = Annotated[Path, typer.Option(help="Folder that gets one folder a run.")]
StreamOption = Annotated[bool, typer.Option(help="Print answers as they come.")]
AddressOption = Annotated[str | None, typer.Option(help="A running Ray cluster.")]


def run(
    context: typer.Context,
    model_name: ModelOption,
    qpc: QpcOption,
    device_id: DevicesOption = "all",
    prompt: PromptOption = None,
    prompts_file: PromptsFileOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = None,
    presence_penalty: PresenceOption = None,
    frequency_penalty: FrequencyOption = None,
    seed: SeedOption = None,
    run_seed: RunSeedOption = None,
    n: NOption = None,
    logprobs: LogprobsOption = None,
    generation_len: GenerationLenOption = None,
    min_tokens: MinTokensOption = None,
    stop: StopOption = None,
    stop_token_ids: StopIdsOption = None,
    ignore_eos: IgnoreEosOption = False,
    speculate: DraftsOption = "auto",
    draft_qpc: DraftQpcOption = None,
    input_len: InputLenOption = None,
    ctx_len: CtxLenOption = None,
    output: OutputOption = Path("runs"),
    stream: StreamOption = True,
    address: AddressOption = None,
    sdk: SdkOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer prompts on every card, one Ray actor a card; print texts and tokens/s."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.run_step import RunRequest, drawn_seed, run_step

    request = RunRequest(
        name="run",
        model=model_name,
        qpc=qpc,
        devices=device_ids(device_id),
        prompt=prompt,
        prompts_file=prompts_file,
        input_len=input_len,
        ctx_len=ctx_len,
        generation_len=generation_len,
        sampling=_sampling(context.params),
        seed=drawn_seed() if run_seed is None else run_seed,
        chat=chat,
        system=system,
        drafts=chosen(speculate, ("auto", "none", "prompt-lookup"), "--speculate"),
        draft_qpc=draft_qpc,
        output=output,
        ray_address=address,
    )
    screen = Screen(stream=stream)
    screen.finish(run_step(request, find_sdk(sdk, screen), screen), as_json=as_json)


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    """The options that are named like sampling fields."""
    fields = {name: given[name] for name in FIELDS if given.get(name) is not None}
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = numbers(fields["stop_token_ids"], "--stop-token-ids")
    try:
        return SamplingParams().updated(fields)
    except RowError as error:
        raise UsageError(str(error)) from error
