"""`qaic-ray run`: its options, and the request that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from qaic_ray.cli.arguments import chosen, device_ids, numbers
from qaic_ray.cli.options import JsonOption, SdkOption, known_path, sdk_choice
from qaic_ray.errors import RowError, UsageError

if TYPE_CHECKING:
    from qaic_ray.pipeline.request import RunRequest
    from qaic_ray.rows import ChatOptions
    from qaic_ray.sampling_params import SamplingParams

RESUME_LAST = Path("last")
"""What `--resume` means where nothing follows it: the run that began last and is not finished."""

FREE_WITH_RESUME = {
    "resume": "--resume",
    "retry_errors": "--retry-errors",
    "prompts_file": "--prompts-file",
    "device_id": "--device-id",
    "address": "--address",
    "stream": "--stream",
    "sdk": "--sdk",
    "as_json": "--json",
}
FORMATS = ("text", "jsonl", "openai", "csv", "tsv", "parquet")


def _option(panel: str, name: str, text: str, **how: Any) -> Any:
    """An option, which the old scripts' spelling names too: `--top-k` and `--top_k`."""
    spellings = dict.fromkeys([name, "--" + name.removeprefix("--").replace("-", "_")])
    return typer.Option(*spellings, help=text, rich_help_panel=panel, **how)


REQUIRED = "What is run (needed, but with --resume)"
PROMPTS = "Prompts"
ModelNameOption = Annotated[
    str | None,
    _option(
        REQUIRED,
        "--model-name",
        "Local folder, hub id, .gguf file, or smollm2-135m.",
        show_default=False,
    ),
]
QpcOption = Annotated[
    Path | None, _option(REQUIRED, "--qpc", "Folder of a compiled variant.", callback=known_path)
]
PromptOption = Annotated[
    str | None, _option(PROMPTS, "--prompt", r"Prompts separated by |; \| is a pipe of the text.")
]
PromptsFileOption = Annotated[
    str | None,
    _option(
        PROMPTS, "--prompts-file", "Lines of text; .jsonl, .csv: prompt or messages; - for stdin."
    ),
]
ChatOption = Annotated[
    bool, _option(PROMPTS, "--chat", "Put each prompt into the model's chat template.")
]
SystemOption = Annotated[
    str | None, _option(PROMPTS, "--system", "With --chat: the system message.")
]
TemplateOption = Annotated[
    Path | None, _option(PROMPTS, "--chat-template", "A Jinja file instead of the model's own.")
]
TemplateKwargsOption = Annotated[
    str | None,
    _option(
        PROMPTS,
        "--chat-template-kwargs",
        """Variables for the template: '{"enable_thinking": false}'.""",
    ),
]
ContinueOption = Annotated[
    bool, _option(PROMPTS, "--continue-final-message", "Go on with the last message of a chat.")
]
NoGenerationPromptOption = Annotated[
    bool,
    _option(
        PROMPTS, "--no-add-generation-prompt", "Do not end a chat with the answer's beginning."
    ),
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
    _option(
        DRAFTS,
        "--draft-qpc",
        "Folder of a smaller model's QPC, to run beside the other.",
        callback=known_path,
    ),
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

FormatOption = Annotated[
    str | None,
    _option(
        PROMPTS,
        "--prompts-format",
        "text, jsonl, openai, csv, tsv or parquet.",
        show_default="by name and content",
    ),
]

CARDS = "Cards"
DevicesOption = Annotated[str, _option(CARDS, "--device-id", "0,1,2,3 or all.")]
PartitionsOption = Annotated[
    int, _option(CARDS, "--partitions", "Workers of one card, each with as many NSPs.", min=1)
]
GroupOption = Annotated[
    int, _option(CARDS, "--group-size", "Cards of one worker, for a tensor-sliced QPC.", min=1)
]

FOLDER = "The run folder"
OutputOption = Annotated[
    Path, _option(FOLDER, "--output", "Folder that gets one folder a run.", callback=known_path)
]
OutputFormatOption = Annotated[
    list[str] | None,
    _option(FOLDER, "--output-format", "Beside outputs.jsonl: openai, parquet; may be repeated."),
]
ResumeOption = Annotated[
    Path | None,
    _option(
        FOLDER,
        "--resume",
        "Go on where a run stopped: its folder, or nothing for the last unfinished one.",
        metavar="[RUN]",
        callback=known_path,
    ),
]
RetryOption = Annotated[
    bool, _option(FOLDER, "--retry-errors", "With --resume: its rows of errors once more.")
]

CHECKS = "Checks"
InputLenOption = Annotated[
    int | None, _option(CHECKS, "--input-len", "Must be what the QPC was compiled for.")
]
CtxLenOption = Annotated[
    int | None, _option(CHECKS, "--ctx-len", "Must be what the QPC was compiled for.")
]
StreamOption = Annotated[bool, typer.Option(help="Print answers as they come.")]
AddressOption = Annotated[str | None, typer.Option(help="A running Ray cluster.")]


class Resumable(TyperCommand):
    """A command whose `--resume` may stand without a folder, as typer's options may not."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write out what is meant, then parse."""
        ends = [word.startswith("-") for word in args[1:]] + [True]
        full = [
            f"--resume={RESUME_LAST}" if word == "--resume" and is_last else word
            for word, is_last in zip(args, ends, strict=False)
        ]
        return list(super().parse_args(ctx, full))


def run(
    context: typer.Context,
    model_name: ModelNameOption = None,
    qpc: QpcOption = None,
    prompt: PromptOption = None,
    prompts_file: PromptsFileOption = None,
    prompts_format: FormatOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    chat_template: TemplateOption = None,
    chat_template_kwargs: TemplateKwargsOption = None,
    continue_final_message: ContinueOption = False,
    no_add_generation_prompt: NoGenerationPromptOption = False,
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
    device_id: DevicesOption = "all",
    partitions: PartitionsOption = 1,
    group_size: GroupOption = 1,
    input_len: InputLenOption = None,
    ctx_len: CtxLenOption = None,
    output: OutputOption = Path("runs"),
    output_format: OutputFormatOption = None,
    resume: ResumeOption = None,
    retry_errors: RetryOption = False,
    stream: StreamOption = True,
    address: AddressOption = None,
    sdk: SdkOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer prompts on every card, one Ray actor a card; print texts and tokens/s."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.request import last_unfinished
    from qaic_ray.pipeline.run_step import run_step

    screen = Screen(stream=stream)
    if resume is not None:
        _refuse_changes(context, resume)
    if resume == RESUME_LAST:
        resume = last_unfinished(output)
        if resume is None:
            screen.remark(f"No run in {output} is unfinished.")
            return
    request = _asked(context.params) if resume is None else _resumed(context, resume)
    screen.finish(run_step(request, sdk_choice(sdk, screen), screen), as_json=as_json)


def _asked(given: Mapping[str, Any]) -> RunRequest:
    """The request that the options make."""
    from qaic_ray.pipeline.request import RunRequest, drawn_seed

    if given["model_name"] is None or given["qpc"] is None:
        raise UsageError("Give --model-name and --qpc, or --resume with the folder of a run.")
    if given["retry_errors"]:
        raise UsageError("--retry-errors is for --resume: give the folder of the run with it.")
    form, seed = given["prompts_format"], given["run_seed"]
    same = (
        *("qpc", "prompt", "prompts_file", "input_len", "ctx_len", "generation_len", "chat"),
        *("system", "draft_qpc", "partitions", "group_size", "output"),
    )
    return RunRequest(
        name="run",
        model=given["model_name"],
        devices=device_ids(given["device_id"]),
        prompts_format=None if form is None else chosen(form, FORMATS, "--prompts-format"),
        output_formats=tuple(
            chosen(word, ("openai", "parquet"), "--output-format")
            for word in given["output_format"] or ()
        ),
        sampling=_sampling(given),
        chat_options=_chat_options(given),
        chat_template=_chat_template(given["chat_template"]),
        seed=drawn_seed() if seed is None else seed,
        drafts=chosen(given["speculate"], ("auto", "none", "prompt-lookup"), "--speculate"),
        ray_address=given["address"],
        **{name: given[name] for name in same},
    )


def _given(context: typer.Context) -> list[str]:
    """The options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def _refuse_changes(context: typer.Context, resume: Path) -> None:
    """Only what changes no answer may be said anew of a run that goes on."""
    free = FREE_WITH_RESUME.keys() | ({"output"} if resume == RESUME_LAST else ())
    fixed = [name for name in _given(context) if name not in free]
    if fixed:
        option = "--" + fixed[0].replace("_", "-")
        whose = "its folder" if resume == RESUME_LAST else resume
        raise UsageError(
            f"{option} cannot be changed in the middle of a run: leave it out, {whose} knows it; "
            f"only {', '.join(list(FREE_WITH_RESUME.values())[1:])} may stand beside --resume."
        )


def _resumed(context: typer.Context, folder: Path) -> RunRequest:
    """The request of a run folder."""
    from qaic_ray.pipeline.request import read_request

    request = replace(read_request(folder), retry_errors=context.params["retry_errors"])
    if "device_id" in _given(context):
        request = replace(request, devices=device_ids(context.params["device_id"]))
    if "prompts_file" in _given(context):
        path = context.params["prompts_file"]
        request = replace(request, prompt=None, prompts_file=path, new_input=True)
    return replace(request, ray_address=context.params["address"])


def _chat_options(given: Mapping[str, Any]) -> ChatOptions:
    from qaic_ray.documents import as_object, parse_json
    from qaic_ray.rows import ChatOptions

    text, source = given["chat_template_kwargs"], "--chat-template-kwargs"
    kwargs = {} if text is None else as_object(parse_json(text, source), source)
    return ChatOptions(
        add_generation_prompt=not given["no_add_generation_prompt"],
        continue_final_message=given["continue_final_message"],
        template_kwargs=kwargs,
    )


def _chat_template(path: Path | None) -> str | None:
    from qaic_ray.documents import read_text, user_path

    return None if path is None else read_text(user_path(path, "--chat-template"))


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    """The options that are named like sampling fields."""
    from qaic_ray.sampling_params import FIELDS, SamplingParams

    fields = {name: given[name] for name in FIELDS if given.get(name) is not None}
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = numbers(fields["stop_token_ids"], "--stop-token-ids")
    try:
        return SamplingParams().updated(fields)
    except RowError as error:
        raise UsageError(str(error)) from error
