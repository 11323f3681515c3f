"""The vendor's compiler: ONNX in, a folder with a QPC out; `main(argv)` is the command.

Builds in a temporary folder beside the target and renames it at the end, so a killed compile
leaves nothing that looks finished. Takes any ONNX model with `X` and `X_RetainedState` pairs.

Covered: command line, config files, messages, rounding of constants and cache. Inferred: statuses
other than 0 and 255. Not covered: everything that makes a real program fast (splitting over
cores, memory planning), running on the card after compiling, and the card's size: a program too
large for it is refused when it is loaded.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import Sequence, Tuple

import onnx

from ..container import AI100, FILE_NAME, steps
from ..folder import FolderError, current
from ..lowering import graph
from ..lowering.graph import GraphError
from . import argv as command_line
from . import build as builder
from . import configs
from . import report as reports
from .argv import ArgvError, Options
from .build import Build
from .configs import ConfigError, Partition
from .levels import UINT8_WHERE_POSITIVE
from .quantize import Quantization
from .report import Report
from .weights import ConstantError, Precision

VERSION_VARIABLE = "QAIC_EMULATOR_APPS_VERSION"
UNSUPPORTED_VARIABLE = "QAIC_COMPILER_OPTS_UNSUPPORTED"
"""Options of the vendor's own developers, which public profiling programs set."""

_KEPT_TYPES = ("-execute-nodes-in-fp16", "-keep-original-precision-for-nodes")
_NAMED_SPECIALIZATIONS_SINCE = (1, 22)
_HARDWARE_NAMES_SINCE = (1, 21)
# Inferred: the first QEfficient that passes `ai200` is that of Apps 1.22.
_AI200_SINCE = (1, 22)
# Inferred: QEfficient released weight-free exports after it, and for no named version.
_EXTDATA_SINCE = (1, 22)
_DEFAULT_VERSION = "1.22"
_REFUSED = 255
_FAILED = 1


def main(argv: Sequence[str]) -> int:
    """Run the compiler on its arguments, the program's name not included.

    Returns:
        0, or 255 for a refused command line or config file, or 1 for a failed compile.
    """
    if not argv or any(a in command_line.HELP_FLAGS for a in argv):
        print(command_line.usage())
        return 0 if argv else _REFUSED
    try:
        options = command_line.parse(argv)
        if "-operators-supported" in options.values:
            _list_operators()
            return 0
        build = plan(options)
    except (ArgvError, ConfigError) as error:
        print(error, file=sys.stderr)
        return _REFUSED
    unheeded = _unheeded(options)
    for argument in unheeded:
        print(f"Option {argument} is accepted and has no effect on this emulated SDK.")
    try:
        if "-dump-profile" in options.values:
            return _dump(build, options.values["-dump-profile"])
        report = run(build, unheeded)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return _REFUSED
    except (GraphError, ConstantError) as error:
        print(f"QAIC_ERROR:\nError message:  {error}", file=sys.stderr)
        print("QAICException:Unable to AddNodesToGraphFromModel", file=sys.stderr)
        return _FAILED
    except OSError as error:
        named = error.strerror and error.filename
        reason = f"{error.filename}: {error.strerror}" if named else error
        print(f"QAIC_ERROR:\nError message:  {reason}", file=sys.stderr)
        return _FAILED
    for line in report.warnings:
        print(line)
    if build.quantization is not None and not build.quantization.has_inputs:
        print("Warning: no -input-list-file: ranges are those of random data, and answers are too")
    if report.not_lowered is not None:
        print(f"The graph runs as it is, without faster operators: {report.not_lowered}")
    else:
        steps.make_kernels()
    print(f"Generated binary is present at {options.values['-aic-binary-dir']}")
    return 0


def _unheeded(options: Options) -> Sequence[str]:
    """The options that have no effect, those of the environment too."""
    more = os.environ.get(UNSUPPORTED_VARIABLE)
    return [*options.without_effect, *([f"{UNSUPPORTED_VARIABLE}={more}"] if more else [])]


def apps_version() -> str:
    """Version of the SDK that this compiler belongs to."""
    named = os.environ.get(VERSION_VARIABLE)
    if named:
        return named
    try:
        return current().apps_version
    except FolderError:
        return _DEFAULT_VERSION


def _numbers(version: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))


def _list_operators() -> None:
    names = {s.name for s in onnx.defs.get_all_schemas() if not s.domain and not s.deprecated}
    print("\n".join(sorted(names)))


def plan(options: Options) -> Build:
    """Check a command line as a whole and read the files it names.

    Raises:
        ArgvError: where a mandatory flag is missing or a value is impossible.
        ConfigError: where a file is refused.
    """
    values = options.values
    version = apps_version()
    dumps = "-dump-profile" in values
    for flag in ("-m", *(() if dumps else ("-aic-hw", "-aic-binary-dir"))):
        if flag not in values:
            raise ArgvError(
                f"Option {flag} is required. Use -h, -help, or --help for list of options."
            )
    hardware = _hardware(values.get("-aic-hw-version", "2.0"), version)
    partition = Partition(1, int(values.get("-aic-num-cores", "1")))
    if "-mdp-load-partition-config" in values:
        partition = configs.read_partition(values["-mdp-load-partition-config"])
    symbols = [dict(options.symbols)]
    if "-network-specialization-config" in values:
        entries = configs.read_specializations(
            values["-network-specialization-config"],
            named=_numbers(version) >= _NAMED_SPECIALIZATIONS_SINCE,
        )
        symbols = [dict(options.symbols, **entry) for entry in entries]
    io_precisions = {}
    if "-custom-IO-list-file" in values:
        io_precisions = configs.read_custom_io(values["-custom-IO-list-file"])
    batch_size = values.get("-batchsize")
    return Build(
        model_path=values["-m"],
        target=os.path.abspath(values.get("-aic-binary-dir", "")),
        apps_version=version,
        precision=Precision(options.on("-convert-to-fp16"), options.on("-mxfp6-matmul")),
        partition=partition,
        symbols=symbols,
        io_precisions=io_precisions,
        retained=options.on("-retained-state"),
        batch_size=None if batch_size is None else int(batch_size),
        hardware=hardware,
        outputs=options.outputs,
        quantization=_quantization(options) if options.quantizes else None,
        reads_extdata=_numbers(version) >= _EXTDATA_SINCE,
    )


def _quantization(options: Options) -> Quantization:
    values = options.values
    if options.on("-convert-to-fp16"):
        raise ArgvError(
            "Option -convert-to-fp16 cannot be used with quantization: leave out one of them."
        )
    if options.on("-convert-to-quantize") and {"-dump-profile", "-load-profile"} & set(values):
        raise ArgvError(
            "Option -convert-to-quantize cannot be used along with -dump-profile or -load-profile."
        )
    others = {"-convert-to-quantize", "-dump-profile", "-load-profile"}.intersection(values)
    if "-external-quantization" in values and others:
        raise ArgvError(
            f"Option -external-quantization cannot be used along with {sorted(others)[0]}."
        )
    for flag in ("-input-list-file", "-load-profile", "-external-quantization"):
        if flag in values and not os.path.isfile(values[flag]):
            raise ConfigError(f"Failed to open file: {values[flag]}")
    both = values.get("-quantization-schema", UINT8_WHERE_POSITIVE)
    types = ",".join(values.get(flag, "") for flag in _KEPT_TYPES).split(",")
    names = values.get("-node-precision-info")
    return Quantization(
        activations=values.get("-quantization-schema-activations", both),
        constants=values.get("-quantization-schema-constants", both),
        calibration=values.get("-quantization-calibration", "None"),
        percentile=float(values.get("-percentile-calibration-value", "100")),
        num_bins=int(values.get("-num-histogram-bins", "512")),
        bias_bits=8 if values.get("-quantization-precision-bias") == "Int8" else 32,
        channelwise=options.on("-enable-channelwise"),
        rowwise=options.on("-enable-rowwise"),
        kept_types=frozenset(filter(None, types)),
        kept_nodes=frozenset(configs.read_node_precisions(names) if names else ()),
        list_file=values.get("-input-list-file"),
        random=values.get("-use-random-input-data"),
        profile=values.get("-load-profile"),
        encodings=values.get("-external-quantization"),
    )


def _dump(build: Build, path: str) -> int:
    """Write a quantization profile and nothing else, as the vendor's command does."""
    print(f"Reading ONNX Model from {build.model_path}", flush=True)
    builder.profile(build, graph.load(build.model_path), path)
    print(f"Quantization profile is present at {path}")
    return 0


def _hardware(hardware: str, version: str) -> str:
    """The hardware that an `-aic-hw-version` means, where this version knows it."""
    known = ["2.0"]
    if _numbers(version) >= _HARDWARE_NAMES_SINCE:
        known.append(AI100)
    if _numbers(version) >= _AI200_SINCE:
        known.append("ai200")
    if hardware not in known:
        raise ArgvError(
            f"Invalid value '{hardware}' for option -aic-hw-version: must be one of "
            f"{', '.join(known)}."
        )
    return AI100 if hardware == "2.0" else hardware


def run(build: Build, unheeded: Sequence[str] = ()) -> Report:
    """Compile into a temporary folder and rename it to the target.

    `unheeded` are the options that its report lists as without effect.

    Raises:
        GraphError, ConstantError: where the model is refused.
        OSError: where the folder cannot be written, or is there already with something in it.
    """
    print(f"Reading ONNX Model from {build.model_path}", flush=True)
    model = graph.load(build.model_path)
    print(f"loading compiler from: {os.path.abspath(__file__)}", flush=True)
    if os.path.isdir(build.target) and os.listdir(build.target):
        raise FileExistsError(
            f"The folder {build.target} is there already and is not empty; remove it first"
        )
    print("Compile started ............... ", flush=True)
    if build.precision.convert_to_fp16:
        print("Compiling model with FP16 precision.", flush=True)
    parent, name = os.path.split(build.target)
    os.makedirs(parent, exist_ok=True)
    _remove_abandoned(parent, name)
    temporary = os.path.join(parent, f".{name}.tmp-{os.getpid()}")
    os.mkdir(temporary)
    try:
        report = builder.write(build, model, os.path.join(temporary, FILE_NAME))
        path = os.path.join(temporary, reports.FILE_NAME)
        reports.write(path, build.facts(), report, unheeded)
        _sync_folder(temporary)
        os.rename(temporary, build.target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(parent)
    return report


def _remove_abandoned(parent: str, name: str) -> None:
    """Remove what killed compiles of the same target have left."""
    for entry in os.listdir(parent):
        prefix, _, pid = entry.rpartition("-")
        if prefix == f".{name}.tmp" and pid.isdigit() and not os.path.isdir(f"/proc/{pid}"):
            shutil.rmtree(os.path.join(parent, entry), ignore_errors=True)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
