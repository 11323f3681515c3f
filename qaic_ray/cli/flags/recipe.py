"""The flags of the published recipe's scripts that are called otherwise here, or are not here.

Those that have their name here need no entry. Sources: generateModel.py, runModel.py and the
compileModel scripts of the public Cloud AI SDK, in all their versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from qaic_ray.errors import UsageError

_CALLED: Mapping[str, Mapping[str, str]] = {
    "export": {"--model-type": "--model-class", "--model-path": "--output"},
    "compile": {
        **dict.fromkeys(("--seq-len", "--prompt-length", "--input-len"), "--prompt-len"),
        **dict.fromkeys(("--context-len", "--context-length"), "--ctx-len"),
    },
    "run": {
        **dict.fromkeys(("--seq-len", "--prompt-len", "--prompt-length"), "--input-len"),
        **dict.fromkeys(("--context-len", "--context-length"), "--ctx-len"),
    },
}
"""Command -> flag of its script, or what its text calls one -> ours, of the same meaning."""

_GONE: Mapping[str, Mapping[str, str]] = {
    "export": {
        "--input-str": "the check against PyTorch chooses its own inputs",
        "--seq-len": (
            "a model has no lengths before it is compiled; say them there, in "
            "specializations.json or by --prompt-len and --ctx-len"
        ),
        "--use-auth-token": (
            "a token is found where huggingface's tools look, after `hf auth login` or in $HF_TOKEN"
        ),
        "--run-on-aic": (
            "compile the model and run it; `qaic-ray doctor --try-cards` tries the cards alone"
        ),
    },
    "run": {
        "--enable-debug-logs": "what the runtime prints is in logs/ of the run folder",
        "--write-io-dir": (
            "no tensors are kept; a row's token ids, times and logprobs are in outputs.jsonl of "
            "the run folder, and the script itself runs QPCs of `qaic-ray export --io cache-index`"
        ),
        "--automation": "say --json in its place: stdout is the figures then, as one JSON object",
    },
}
"""Command -> flag of its script -> what to do, as the rest of a sentence."""

_MODEL_FLAGS = {"--model-name", "--model_name", "--model", "-m"}
_SCRIPTS = {"export": "generateONNX.py", "run": "runModel.py"}
_MULTI_SOC = ("BS", "PL", "CL", "CORES", "MOS", "OLS", "SOCS")
"""What follows the model in compileModel_multi_soc.sh."""


def translated(command: str, args: Sequence[str]) -> list[str]:
    """A command line with our names of the scripts' flags.

    Args:
        command: `export`, `compile`, `run`, or any other, which is left as it is.
        args: the words behind it.

    Raises:
        UsageError: for a flag, or a form, of the scripts that is not here; it says what is.
    """
    if command == "compile":
        _refuse_multi_soc(args)
    if command == "run":
        _refuse_words_behind_prompt(args)
    known, gone = _CALLED.get(command, {}), _GONE.get(command, {})
    words: list[str] = []
    for at, word in enumerate(args):
        if word == "--":
            return [*words, *args[at:]]
        typed, equals, value = word.partition("=")
        flag = f"--{typed[2:].replace('_', '-')}" if typed.startswith("--") else ""
        if flag in gone:
            raise UsageError(
                f"{typed} of {_SCRIPTS[command]} is not a flag of `qaic-ray {command}`: leave it "
                f"out; {gone[flag]}."
            )
        words.append(f"{known[flag]}{equals}{value}" if flag in known else word)
    return words


def _refuse_words_behind_prompt(args: Sequence[str]) -> None:
    """A prompt without quotes; the recipe's text says only `--prompt <Enter prompt>`."""
    if "--prompt" not in args or not _MODEL_FLAGS & {word.partition("=")[0] for word in args}:
        return
    behind = args[args.index("--prompt") + 1 :]
    words = list(takewhile(lambda word: not word.startswith("-"), behind))
    if len(words) > 1:
        prompt = " ".join(words)
        raise UsageError(
            f'A prompt of several words stands between double quotes: --prompt "{prompt}".'
        )


def _refuse_multi_soc(args: Sequence[str]) -> None:
    """The form of seven numbers behind the model."""
    numbers = args[1 : 1 + len(_MULTI_SOC)]
    if len(numbers) < len(_MULTI_SOC) or not all(map(str.isdecimal, numbers)):
        return
    batch, prompt, ctx, cores, _, _, socs = numbers
    precision = "mx6" if "-mxfp6-matmul" in args else "fp16"
    new = (
        f"qaic-ray compile {args[0]} {precision} {cores} --batch-size {batch} "
        f"--prompt-len {prompt} --ctx-len {ctx}"
    )
    more = (
        ""
        if socs == "1"
        else f" That is a program of one SoC; one of {socs} is made by the vendor's compiler alone "
        f"(-mdp-load-partition-config), and run with --group-size {socs}."
    )
    raise UsageError(
        "The numbers of compileModel_multi_soc.sh have names here, and there are no MOS and OLS: "
        f"`{new}`.{more}"
    )
