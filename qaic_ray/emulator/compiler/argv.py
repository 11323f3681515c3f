"""The compiler's command line: single dashes, `-flag=value`; every flag that public sources name.

A flag is obeyed, or accepted without effect (and then listed in the compiler's output and report),
or unknown and refused with the vendor's text. `-compiler-args` holds more of them.
"""

from __future__ import annotations

import re
import shlex
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..documents import Refusal

MAX_CORES = 16

_COMPILER_ARGS = "-compiler-args"
_EXTERNAL = "-external-quantization"

HELP_FLAGS = ("-h", "-help", "--help", "--usage")


class ArgvError(Refusal):
    """A command line that the compiler refuses; the message is its text."""


def _switch(flag: str, value: Optional[str]) -> str:
    value = "true" if value is None else value.lower()
    if value not in ("true", "false", "1", "0"):
        raise ArgvError(f"Invalid value '{value}' for option {flag}: must be true or false.")
    return "true" if value in ("true", "1") else "false"


def _text(flag: str, value: Optional[str]) -> str:
    if not value:
        raise ArgvError(f"Option {flag} requires a value. Use {flag}=<value>.")
    return value


def _number(low: float, high: float) -> Callable[[str, Optional[str]], str]:
    def check(flag: str, value: Optional[str]) -> str:
        text = _text(flag, value)
        if not re.match(r"^-?[0-9]{1,9}(\.[0-9]{1,9})?$", text, re.ASCII):
            raise ArgvError(f"Invalid value '{text}' for option {flag}: must be a number.")
        if not low <= float(text) <= high:
            raise ArgvError(
                f"Invalid value '{text}' for option {flag}: must be in [{low:g}, {high:g}]."
            )
        return text

    return check


def _numbers(low: int, high: int) -> Callable[[str, Optional[str]], str]:
    one = _number(low, high)

    def check(flag: str, value: Optional[str]) -> str:
        return ",".join(one(flag, part) for part in _text(flag, value).split(","))

    return check


def _effort(flag: str, value: Optional[str]) -> str:
    """Numbers of cores, or -1: as the compiler likes, which QEfficient passes by default."""
    return "-1" if value == "-1" else _numbers(1, MAX_CORES)(flag, value)


def _choice(*choices: str) -> Callable[[str, Optional[str]], str]:
    def check(flag: str, value: Optional[str]) -> str:
        text = _text(flag, value)
        if text not in choices:
            raise ArgvError(
                f"Invalid value '{text}' for option {flag}: must be one of {', '.join(choices)}."
            )
        return text

    return check


def _symbol(flag: str, value: Optional[str]) -> str:
    text = _text(flag, value)
    if not re.match(r"^[^,=]+,[1-9][0-9]{0,8}$", text, re.ASCII):
        raise ArgvError(f"Invalid value '{text}' for option {flag}: must be symbol,value.")
    return text


def _names(flag: str, value: Optional[str]) -> str:
    names = [name.strip() for name in _text(flag, value).split(",")]
    if not all(names):
        raise ArgvError(f"Invalid value '{value}' for option {flag}: must be names, by commas.")
    return ",".join(names)


def _random_data(flag: str, value: Optional[str]) -> str:
    return _choice("gaussian", "uniform")(flag, "gaussian" if value is None else value)


class Flag(NamedTuple):
    """One option: how its value is checked, whether it changes the program, what it is for.

    What says how to quantize only changes programs that are quantized.
    """

    check: Callable[[str, Optional[str]], str]
    obeyed: bool
    help: str
    of_quantization: bool = False


def _obeyed(check: Callable[[str, Optional[str]], str], text: str) -> Flag:
    return Flag(check, True, text)


def _accepted(check: Callable[[str, Optional[str]], str], text: str) -> Flag:
    return Flag(check, False, text)


def _quantizing(check: Callable[[str, Optional[str]], str], text: str) -> Flag:
    return Flag(check, True, text, of_quantization=True)


_SCHEMAS = _choice("asymmetric", "symmetric", "symmetric_with_uint8", "symmetric_with_power2_scale")
_MANY = 1 << 30
_MOST_BINS = 1 << 16

FLAGS: Dict[str, Flag] = {
    "-m": _obeyed(_text, "path of the ONNX model"),
    "-model": _obeyed(_text, "same as -m"),
    "-aic-hw": _obeyed(_switch, "build for hardware"),
    "-aic-hw-version": _obeyed(_text, "hardware: 2.0, ai100 or ai200"),
    "-compile-only": _obeyed(_switch, "do not run after compiling"),
    "-aic-compile-only-test": _obeyed(_switch, "same as -compile-only"),
    "-compiler-args": _obeyed(_text, "more options, separated by spaces"),
    "-output-node-name": _obeyed(_names, "outputs of the program: nodes or values of the graph"),
    "-qpc-crc": _obeyed(_switch, "CRC of the program; here there always is one"),
    "-aic-binary-dir": _obeyed(_text, "folder to make, for the program"),
    "-aic-num-cores": _obeyed(_number(1, MAX_CORES), "NSPs of one instance"),
    "-convert-to-fp16": _obeyed(_switch, "all floating point in fp16"),
    "-onnx-define-symbol": _obeyed(_symbol, "value of a dynamic dimension: symbol,value"),
    "-network-specialization-config": _obeyed(_text, "JSON of specializations"),
    "-custom-IO-list-file": _obeyed(_text, "YAML of IO precisions"),
    "-retained-state": _obeyed(_switch, "keep X_RetainedState as the next X on the card"),
    "-mxfp6-matmul": _obeyed(_switch, "compress constant MatMul weights to MXFP6 E2M3"),
    "-mdp-load-partition-config": _obeyed(_text, "JSON of devices to spread over"),
    "-batchsize": _obeyed(_number(1, _MANY), "value of a dynamic batch dimension"),
    "-v": _accepted(_switch, "more output"),
    "-vv": _accepted(_switch, "more output"),
    "-vvv": _accepted(_switch, "more output"),
    "-mos": _accepted(_effort, "effort to reduce on-chip memory"),
    "-ols": _accepted(_numbers(1, MAX_CORES), "operator splitting"),
    "-mdts-mos": _accepted(_number(0, MAX_CORES), "effort to reduce on-chip memory, slicing"),
    "-multicast-weights": _accepted(_switch, "load shared weights once"),
    "-stats-batchsize": _accepted(_number(1, _MANY), "batch for statistics"),
    "-dump-custom-IO-config-template": _accepted(_text, "file for a custom IO template"),
    "-allow-mxint8-mdp-io": _accepted(_switch, "MXINT8 between SoCs"),
    "-mdp-dump-partition-config": _accepted(_text, "file for a partition"),
    "-mdp-compiler-visible": _accepted(_switch, "partitioning seen by the compiler"),
    "-user-tiled": _accepted(_switch, "tiles as the graph's author has them"),
    "-split-retained-state-io": _accepted(_switch, "buffers of retained states of their own"),
    "-aic-minimize-host-traffic": _accepted(_switch, "less traffic with the host"),
    "-aic-op-stats": _accepted(_switch, "statistics of operators"),
    "-aic-time-passes": _accepted(_switch, "time of compiler passes"),
    "-version": _accepted(_switch, "version of the compiler"),
    "-aic-version": _accepted(_switch, "version of the compiler"),
    "-aic-ddr-to-multicast": _accepted(_switch, "multicast of what DDR holds"),
    "-aic-form-axis-uniform-constants": _accepted(_switch, "constants of one value an axis"),
    "-aic-userdma-producer-dma": _accepted(_switch, "DMA by the producer"),
    "-aic-enable-depth-first": _accepted(_switch, "depth-first scheduling"),
    "-aic-depth-first-mem": _accepted(_number(8, 32), "memory of depth-first scheduling"),
    "-allocator-dealloc-delay": _accepted(_number(0, 10), "buffer lifetime"),
    "-size-split-granularity": _accepted(_number(512, 2048), "largest tile, KiB"),
    "-vtcm-working-set-limit-ratio": _accepted(_number(0, 1), "share of VTCM an instruction takes"),
    "-sdp-cluster-sizes": _accepted(_text, "single-device partition clusters"),
    "-device-id": _accepted(_number(0, _MANY), "card to run on after compiling"),
    "-aic-num-of-instances": _accepted(_number(1, MAX_CORES), "instances to run after compiling"),
    "-num-iter": _accepted(_number(1, _MANY), "iterations to run after compiling"),
    "-set-size": _accepted(_number(1, _MANY), "set size to run after compiling"),
    "-sub-functions": _accepted(_switch, "ONNX functions stay functions"),
    "-always-expand-onnx-functions": _accepted(_switch, "ONNX functions are expanded"),
    "-stats-level": _accepted(_number(0, 100), "statistics"),
    "-aic-perf-metrics": _accepted(_switch, "write performance metrics"),
    "-aic-perf-warnings": _accepted(_switch, "performance warnings"),
    "-time-passes": _accepted(_switch, "time of compiler passes"),
    "-ddr-stats": _accepted(_switch, "DDR statistics"),
    "-aic-pmu-recipe": _accepted(
        _choice("AxiRd", "AxiWr", "AxiRdWr", "KernelUtil", "HmxMacs"), "PMU recipe"
    ),
    "-aic-pmu-events": _accepted(_numbers(0, _MANY), "PMU events, up to 8"),
    "-aic-profiling-type": _accepted(
        _choice("stats", "trace", "latency", "raw_device_stats"), "device profiling"
    ),
    "-aic-profiling-format": _accepted(_choice("ascii", "json"), "form of device profiles"),
    "-aic-profiling-out-dir": _accepted(_text, "folder of device profiles"),
    "-aic-profiling-num-samples": _accepted(_number(0, _MANY), "device profiles to write"),
    "-aic-profiling-start-iter": _accepted(_number(0, _MANY), "first inference that is profiled"),
    "-io-crc": _accepted(_switch, "CRC of inputs and outputs"),
    "-io-crc-stride": _accepted(_number(1, _MANY), "stride of that CRC"),
    "-io-encrypt": _accepted(_text, "encryption of inputs and outputs"),
    "-combine-inputs": _accepted(_switch, "one buffer for all inputs"),
    "-combine-outputs": _accepted(_switch, "one buffer for all outputs"),
    "-host-preproc": _accepted(_switch, "pre-processing on the host"),
    "-aic-preproc": _accepted(_switch, "pre-processing on the card"),
    "-use-producer-dma": _accepted(_switch, "DMA by the producer"),
    "-compile-threads": _accepted(_number(1, 1024), "compiler threads"),
    "-profiling-threads": _accepted(_number(1, 1024), "profiling threads"),
    "-convert-to-quantize": _quantizing(_switch, "quantize, with ranges from inputs"),
    "-input-list-file": _quantizing(_text, "list of inputs to find ranges with"),
    "-use-random-input-data": _quantizing(_random_data, "random inputs to find ranges with"),
    "-quantization-schema": _quantizing(_SCHEMAS, "quantization, of activations and constants"),
    "-quantization-schema-activations": _quantizing(_SCHEMAS, "quantization"),
    "-quantization-schema-constants": _quantizing(_SCHEMAS, "quantization"),
    "-quantization-calibration": _quantizing(
        _choice("None", "KLMinimization", "KLMinimizationV2", "Percentile", "MSE", "SQNR"),
        "quantization",
    ),
    "-percentile-calibration-value": _quantizing(_number(90, 100), "quantization"),
    "-num-histogram-bins": _quantizing(_number(1, _MOST_BINS), "quantization"),
    "-quantization-precision": _quantizing(_choice("Int8"), "quantization"),
    "-quantization-precision-bias": _quantizing(_choice("Int8", "Int32"), "quantization"),
    "-enable-rowwise": _quantizing(_switch, "quantization"),
    "-enable-channelwise": _quantizing(_switch, "quantization"),
    "-dump-profile": _quantizing(_text, "quantization profile to write"),
    "-load-profile": _quantizing(_text, "quantization profile to read"),
    "-external-quantization": _quantizing(_text, "encodings of AIMET to quantize with"),
    "-execute-nodes-in-fp16": _quantizing(_names, "operators in fp16"),
    "-keep-original-precision-for-nodes": _quantizing(_names, "operators kept as they are"),
    "-node-precision-info": _quantizing(_text, "file of node precisions"),
    "-register-custom-op": _accepted(_text, "YAML of custom operators"),
    "-dynamic-shape-input": _accepted(_switch, "dynamic shapes"),
    "-operators-supported": _accepted(
        _choice("onnx", "tensorflow", "pytorch", "caffe", "caffe2"), "list operators"
    ),
}


class Options(NamedTuple):
    """A checked command line: flag -> last value; repeated symbols; flags without effect.

    `outputs` are the names of `-output-node-name`, which may be repeated too; `arguments` are all
    arguments, those inside of `-compiler-args` one by one.
    """

    values: Dict[str, str]
    symbols: Dict[str, int]
    outputs: Tuple[str, ...]
    arguments: Tuple[str, ...]
    without_effect: Tuple[str, ...]

    def on(self, flag: str) -> bool:
        """Whether a switch was given and is not `false`."""
        return self.values.get(flag) == "true"

    @property
    def quantizes(self) -> bool:
        """Whether the program, or a profile of it, is made by int8 quantization."""
        return _quantizes(self.values)


def parse(argv: Sequence[str]) -> Options:
    """Check a command line, the program's name not included.

    Raises:
        ArgvError: with the vendor's text for an unknown option.
    """
    values: Dict[str, str] = {}
    symbols: Dict[str, int] = {}
    outputs: Dict[str, None] = {}
    without_effect: List[str] = []
    arguments = list(_spread(argv))
    for argument in arguments:
        name, equals, text = argument.partition("=")
        flag = FLAGS.get(name)
        if flag is None:
            raise ArgvError(
                f"Invalid option {argument}. Use -h, -help, or --help for list of options."
            )
        value = flag.check(name, text if equals else None)
        values["-m" if name == "-model" else name] = value
        if name == "-onnx-define-symbol":
            symbol, _, size = value.rpartition(",")
            symbols[symbol] = int(size)
        if name == "-output-node-name":
            outputs.update(dict.fromkeys(value.split(",")))
    for argument in arguments:
        name = argument.partition("=")[0]
        flag = FLAGS[name]
        # A file of encodings says all that there is to say of quantization.
        apart = _EXTERNAL in values and name != _EXTERNAL
        unused = flag.of_quantization and (apart or not _quantizes(values))
        if not flag.obeyed or unused:
            without_effect.append(argument)
    return Options(values, symbols, tuple(outputs), tuple(arguments), tuple(without_effect))


def _quantizes(values: Mapping[str, str]) -> bool:
    by_file = not {"-load-profile", "-dump-profile", _EXTERNAL}.isdisjoint(values)
    return by_file or values.get("-convert-to-quantize") == "true"


def _spread(argv: Sequence[str]) -> Iterator[str]:
    """The arguments, with those that `-compiler-args` holds in its place."""
    for argument in argv:
        name, equals, text = argument.partition("=")
        if name != _COMPILER_ARGS:
            yield argument
            continue
        try:
            inner = shlex.split(_text(name, text if equals else None))
        except ValueError as error:
            raise ArgvError(f"Invalid value '{text[:200]}' for option {name}: {error}.") from error
        for part in inner:
            if part.partition("=")[0] == _COMPILER_ARGS:
                raise ArgvError(f"Option {_COMPILER_ARGS} cannot hold itself.")
            yield part


def usage() -> str:
    """The help text."""
    lines = ["Usage: -m=<model.onnx> -aic-hw -aic-binary-dir=<dir> [options]", ""]
    for name, flag in FLAGS.items():
        note = "" if flag.obeyed else " (accepted, no effect here)"
        note = " (of quantization)" if flag.of_quantization else note
        lines.append(f"  {name:36s} {flag.help}{note}")
    return "\n".join(lines)
