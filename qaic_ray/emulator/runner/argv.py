"""The command line of `qaic-runner`: long options with one dash or two, as `getopt_long_only`.

An option is obeyed, or accepted without effect (and then said so), or unknown and refused. What
stands without an option is ignored, as the vendor's does.
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..documents import Refusal
from ..qaic.hosting import DEFAULT_SET_SIZE
from ..qaicrt.types import DEFAULT_NUM_QUEUE_THREADS

DEFAULT_NUM_ITERATIONS = 40
PROFILING_TYPES = ("latency", "trace", "stats", "raw_device_stats")
_STREAM_TYPES = ("trace_stream", "latency_stream")


class RunnerError(Refusal):
    """The command line or a file that it names is refused; the message is for stderr."""


class HelpAsked(Exception):
    """The help is to be shown, and nothing else."""


class RunnerOptions(NamedTuple):
    """A parsed command line; `num_iterations` and `seconds` are None where they are not given."""

    qpc: str = ""
    qids: Tuple[int, ...] = ()
    num_activations: int = 1
    set_size: int = DEFAULT_SET_SIZE
    num_threads: int = DEFAULT_NUM_QUEUE_THREADS
    num_iterations: Optional[int] = None
    seconds: Optional[int] = None
    input_files: Tuple[str, ...] = ()
    output_files: Tuple[str, ...] = ()
    batch_json: str = ""
    batch_directory: str = ""
    batch_file_list: str = ""
    batch_memory_mb: int = 1024
    auto_batch: bool = True
    unbound_random: bool = False
    compares: bool = False
    writes_outputs: bool = False
    output_start: int = 0
    num_outputs: int = 1
    output_dir: str = "."
    profiling_types: Tuple[str, ...] = ()
    profiling_start: int = 0
    num_profiled: int = 1
    profiling_dir: str = "."
    verbosity: int = 0
    without_effect: Tuple[str, ...] = ()


class Option(NamedTuple):
    """One option: its field, the kind of its value, its letter, its help."""

    field: str
    kind: str
    letter: str
    text: str


_FLAG, _TEXT, _TEXTS, _COUNT, _INDEX, _QIDS = "flag", "text", "texts", "count", "index", "qids"

OPTIONS: Dict[str, Option] = {
    "aic-device-id": Option("qids", _QIDS, "d", "<id>  AIC device ID, default Auto-pick"),
    "aic-device-map": Option("qids", _QIDS, "D", "<qid>[:<qid>]  Devices of one network"),
    "dev-list": Option("qids", _QIDS, "", "<qid>[:<qid>]  Same as --aic-device-map"),
    "test-data": Option("qpc", _TEXT, "t", "<path>  Location of program binaries"),
    "input-file": Option(
        "input_files", _TEXTS, "i",
        "<path>  Input file, once for each input in their order; random input by default",
    ),
    "output-file": Option(
        "output_files", _TEXTS, "o", "<path>  Output file to compare with, once for each output"
    ),
    "compare-output": Option("compares", _FLAG, "c", "Compare with the outputs of the batch JSON"),
    "num-iter": Option("num_iterations", _COUNT, "n", "<num>  Number of iterations, default 40"),
    "time": Option("seconds", _COUNT, "", "<t>  Seconds for which to submit inferences"),
    "aic-num-of-activations": Option("num_activations", _COUNT, "a", "<num>  Activations"),
    "set-size": Option("set_size", _COUNT, "S", "<num>  Set size for inference loop execution"),
    "aic-threads-per-queue": Option("num_threads", _COUNT, "T", "<num>  Threads per queue"),
    "aic-batch-json-input": Option("batch_json", _TEXT, "", "<path>  JSON of inputs and outputs"),
    "aic-batch-input-directory": Option(
        "batch_directory", _TEXT, "", "<path>  Each file is an inference of a network of one input"
    ),
    "aic-batch-input-file-list": Option(
        "batch_file_list", _TEXT, "", "<path>  Each line is an inference: files between commas"
    ),
    "aic-batch-max-memory": Option("batch_memory_mb", _COUNT, "", "<mb>  Memory for batch inputs"),
    "auto-batch-input": Option("auto_batch", "switch", "", "<0|1>  Repeat inputs of batch size 1"),
    "unbound-random": Option("unbound_random", _FLAG, "", "Random bytes of any value"),
    "bound-random": Option("", "none", "", "Random values that fit the input, the default"),
    "write-output-start-iter": Option("output_start", _INDEX, "", "<num>  First output to write"),
    "write-output-num-samples": Option("num_outputs", _COUNT, "", "<num>  Outputs to write"),
    "write-output-dir": Option("output_dir", _TEXT, "", "<path>  Folder for outputs"),
    "aic-profiling-type": Option(
        "profiling_types", _TEXTS, "", "<type>  latency|trace|stats|raw_device_stats, repeatable"
    ),
    "aic-profiling-format": Option("profiling_types", _TEXTS, "", "<type>  Deprecated"),
    "aic-profiling-start-iter": Option("profiling_start", _INDEX, "", "<num>  First sample"),
    "aic-profiling-num-samples": Option("num_profiled", _COUNT, "", "<num>  Samples to save"),
    "aic-profiling-out-dir": Option("profiling_dir", _TEXT, "", "<path>  Folder for profiles"),
    "verbose": Option("verbosity", _FLAG, "v", "Verbose log from program"),
    "help": Option("", "help", "h", "help"),
}  # fmt: skip

# Accepted without effect: name -> whether a value follows, and its letter.
_NO_EFFECT: Dict[str, Tuple[bool, str]] = {
    "live-reporting": (False, "l"),
    "live-reporting-period": (True, "r"),
    "stats": (False, "s"),
    "pre-post-processing": (True, "p"),
    "aic-profiling-start-delay": (True, ""),
    "aic-profiling-duration": (True, ""),
    "aic-profiling-sampling-rate": (True, ""),
    "aic-profiling-reporting-rate": (True, ""),
    "aic-lib-path": (True, ""),
    "submit-timeout": (True, ""),
    "submit-retry-count": (True, ""),
    "dump-input-buffers": (False, ""),
}
_WRITES = ("write-output-start-iter", "write-output-num-samples", "write-output-dir")
_LETTERS = {option.letter: name for name, option in OPTIONS.items() if option.letter}
_LETTERS.update({letter: name for name, (_, letter) in _NO_EFFECT.items() if letter})
_MAX_NUMBER = 1 << 31


def usage(program: str) -> str:
    """The help text."""
    lines = [f"Usage: {program} [options]"]
    for name, option in OPTIONS.items():
        short = f"-{option.letter}, " if option.letter else ""
        lines.append(f"  {short + '--' + name:38s} {option.text}")
    quiet = ", ".join(f"--{name}" for name in _NO_EFFECT)
    lines.append(f"  Accepted without effect here: {quiet}")
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str]) -> RunnerOptions:
    """Read the arguments, the program's name not included.

    Raises:
        HelpAsked: where the help is asked for.
        RunnerError: where they are refused.
    """
    found: Dict[str, Any] = {}
    ignored: List[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            break
        if not word.startswith("-") or word == "-":
            continue
        for name, value in _split(word, words):
            if name in _NO_EFFECT:
                ignored.append(f"--{name}")
            else:
                _take(found, name, value)
    options = RunnerOptions(without_effect=tuple(ignored), **found)
    _check(options)
    return options


def _split(word: str, rest: List[str]) -> List[Tuple[str, Optional[str]]]:
    """The options of one word, with their values; what a value takes is taken from `rest`."""
    text, equals, value = word.lstrip("-").partition("=")
    is_long = word.startswith("--") or len(word) > 2 or word[1] not in _LETTERS
    name = _long_name(text) if is_long else None
    if name is not None:
        if not _takes_value(name):
            if equals:
                raise RunnerError(f"option '--{name}' doesn't allow an argument")
            return [(name, None)]
        return [(name, value if equals else _next(f"'--{name}'", rest))]
    if word.startswith("--") or word[1] not in _LETTERS:
        raise RunnerError(f"unrecognized option '{word}'")
    return _cluster(word[1:], rest)


def _cluster(letters: str, rest: List[str]) -> List[Tuple[str, Optional[str]]]:
    found: List[Tuple[str, Optional[str]]] = []
    for place, letter in enumerate(letters):
        name = _LETTERS.get(letter)
        if name is None:
            raise RunnerError(f"invalid option -- '{letter}'")
        if _takes_value(name):
            attached = letters[place + 1 :]
            return [*found, (name, attached or _next(f"-- '{letter}'", rest))]
        found.append((name, None))
    return found


def _long_name(text: str) -> Optional[str]:
    names = (*OPTIONS, *_NO_EFFECT)
    if text in names:
        return text
    near = [name for name in names if text and name.startswith(text)]
    if len(near) > 1:
        raise RunnerError(f"option '--{text}' is ambiguous: {', '.join(near)}")
    return near[0] if near else None


def _takes_value(name: str) -> bool:
    if name in _NO_EFFECT:
        return _NO_EFFECT[name][0]
    return OPTIONS[name].kind not in (_FLAG, "none", "help")


def _next(shown: str, rest: List[str]) -> str:
    if not rest:
        raise RunnerError(f"option {shown} requires an argument")
    return rest.pop(0)


def _take(found: Dict[str, Any], name: str, value: Optional[str]) -> None:
    option = OPTIONS[name]
    if option.kind == "help":
        raise HelpAsked
    if option.kind == "none":
        return
    if name in _WRITES:
        found["writes_outputs"] = True
    if option.field == "verbosity":
        found["verbosity"] = found.get("verbosity", 0) + 1
    elif option.kind == _TEXTS:
        found[option.field] = (*found.get(option.field, ()), str(value))
    else:
        found[option.field] = _value(name, option.kind, value or "")


def _value(name: str, kind: str, text: str) -> Any:
    if kind == _FLAG:
        return True
    if kind == _TEXT:
        return text
    if kind == _QIDS:
        return _device_ids(name, text)
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 11 else -1
    if kind == "switch" and number in (0, 1):
        return bool(number)
    if kind == _INDEX and number < 0:
        raise RunnerError(f"Set non-negative value for {name}")
    if kind == _COUNT and not 0 < number < _MAX_NUMBER:
        raise RunnerError(f"Set a positive value for {name}")
    if kind == "switch":
        raise RunnerError(f"Set 0 or 1 for {name}")
    return number


def _device_ids(name: str, text: str) -> Tuple[int, ...]:
    parts = text.split(":") if name != "aic-device-id" else [text]
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise RunnerError(f"Set a valid {name}")
    return tuple(int(part) for part in parts)


def _check(options: RunnerOptions) -> None:
    if not options.qpc:
        raise RunnerError("Error: Missing test data path")
    for kind in options.profiling_types:
        if kind not in (*PROFILING_TYPES, *_STREAM_TYPES):
            raise RunnerError(
                f"Invalid profiling type '{kind}': one of {', '.join(PROFILING_TYPES)}"
            )
    batches = (options.batch_json, options.batch_directory, options.batch_file_list)
    if sum(map(bool, (*batches, options.input_files))) > 1:
        raise RunnerError(
            "Inputs may be given in one way only: files, a directory, a list, or JSON"
        )
    last = options.output_start + options.num_outputs
    most = options.num_iterations
    if options.writes_outputs and most is not None and options.seconds is None and last > most:
        raise RunnerError(
            f"The sum of write-output-start-iter({options.output_start}) and "
            f"write-output-num-samples({options.num_outputs}) should be <= numInf({most})."
        )
    if options.writes_outputs:
        _check_folder("output", options.output_dir)
    if options.profiling_types:
        _check_folder("profiling", options.profiling_dir)


def _check_folder(what: str, path: str) -> None:
    """The folder is made where there is none, as the open runner does."""
    try:
        os.makedirs(path, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunnerError(f"Invalid {what} dir: {path}: {reason}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise RunnerError(f"Invalid {what} dir: {path}: it cannot be written")
