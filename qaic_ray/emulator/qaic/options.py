"""What a `qaic.Session` is asked: keyword arguments over a YAML file of them, checked.

Names are the documented ones, with `-` or `_`. What is no option of the session itself is one of
the compiler's, and is checked by the compiler's own table of flags.
"""

from __future__ import annotations

import difflib
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from ..compiler.argv import FLAGS
from ..documents import Refusal, parse_mapping, read_text, shown
from .hosting import DEFAULT_SET_SIZE

Symbols = List[Tuple[str, int]]

_BACKEND = "aic"
_MAX_COUNT = 1 << 16
# Options of the compiler whose documented keyword is not its flag with underscores.
_KEYWORD_TO_FLAG = {
    "allocator_dealloac_delay": "-allocator-dealloc-delay",
    "custom_io_list_file": "-custom-IO-list-file",
    "dump_custom_io_config_template_file": "-dump-custom-IO-config-template",
    "external_quantization_file": "-external-quantization",
    "node_precision_info_file": "-node-precision-info",
    "output_node_names": "-output-node-name",
}
_ALWAYS_PASSED = ("aic_hw", "aic_hw_version", "compile_only")
_NAMED_BY_SESSION = ("m", "model", "aic_binary_dir", "h", "help")


class OptionError(Refusal, ValueError):
    """An option, or a file of them, that a session does not take."""


class SessionOptions(NamedTuple):
    """The options of one session; `compile_flags` are the compiler's arguments."""

    dev_id: int = 0
    num_activations: int = 1
    set_size: int = DEFAULT_SET_SIZE
    oversubscription_name: str = ""
    enable_metrics: bool = False
    enable_profiling: bool = False
    output_dir: str = ""
    backend: str = _BACKEND
    compile_flags: Tuple[str, ...] = ()


_OWN = tuple(name for name in SessionOptions._fields if name != "compile_flags")


def read_options(options_path: Optional[str], given: Mapping[str, Any]) -> SessionOptions:
    """The options of a file, and those that were given, which win.

    Raises:
        OptionError: for an unknown option, a wrong value, or a file that cannot be read.
    """
    merged: Dict[str, Any] = {}
    if options_path is not None:
        text = read_text(str(options_path), OptionError)
        merged.update(_named(parse_mapping(text, str(options_path), OptionError)))
    merged.update(_named(given))
    own = {name: merged.pop(name) for name in _OWN if name in merged}
    options = SessionOptions(**{name: _checked(name, value) for name, value in own.items()})
    _check_together(options)
    return options._replace(compile_flags=tuple(_flags(merged)))


def updated(options: SessionOptions, given: Mapping[str, Any]) -> SessionOptions:
    """The options with some of the session's own changed.

    Raises:
        OptionError: for an option that a session cannot change, or a wrong value.
    """
    changes = {}
    for name, value in _named(given).items():
        if name not in _OWN:
            raise OptionError(f"{name} cannot be changed after creation; {_meant(name, _OWN)}")
        changes[name] = _checked(name, value)
    changed = options._replace(**changes)
    _check_together(changed)
    return changed


def _named(given: Mapping[str, Any]) -> Dict[str, Any]:
    return {str(name).replace("-", "_"): value for name, value in given.items()}


def _check_together(options: SessionOptions) -> None:
    if options.enable_metrics and options.enable_profiling:
        raise OptionError(
            "enable_metrics and enable_profiling cannot be used together; enable_profiling gives "
            "the metrics too"
        )
    if options.oversubscription_name and options.num_activations != 1:
        raise OptionError("oversubscription_name needs num_activations=1")
    if options.backend not in (_BACKEND, "qaic"):
        raise OptionError(f"backend {shown(options.backend)} is not supported; it is '{_BACKEND}'")


def _checked(name: str, value: Any) -> Any:
    kind = type(SessionOptions._field_defaults[name])
    if kind is str and value is None:
        return ""
    if kind is int:
        least = 0 if name == "dev_id" else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _MAX_COUNT:
            raise OptionError(f"{name} must be a number from {least} on, not {shown(value)}")
    elif not isinstance(value, kind):
        words = "a text" if kind is str else "true or false"
        raise OptionError(f"{name} must be {words}, not {shown(value)}")
    return value


def _flags(given: Mapping[str, Any]) -> List[str]:
    """The compiler's arguments for these keywords."""
    known = _compile_keywords()
    flags = []
    for name, value in given.items():
        if name in _ALWAYS_PASSED:
            continue
        if name not in known:
            raise OptionError(f"unknown option {name}; {_meant(name, (*_OWN, *known))}")
        flags += _arguments(known[name], name, value)
    return flags


def _compile_keywords() -> Dict[str, str]:
    known = {flag[1:].replace("-", "_").lower(): flag for flag in FLAGS}
    known.update({word: flag for word, flag in _KEYWORD_TO_FLAG.items() if flag in FLAGS})
    return {name: flag for name, flag in known.items() if name not in _NAMED_BY_SESSION}


def _meant(name: str, known: Tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"options of a session: {', '.join(_OWN)}"


def _arguments(flag: str, name: str, value: Any) -> List[str]:
    if name == "onnx_define_symbol":
        return [f"{flag}={symbol},{size}" for symbol, size in _symbols(value)]
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, (list, tuple)):
        return [f"{flag}={','.join(map(str, value))}"]
    if isinstance(value, (str, int, float)):
        return [f"{flag}={value}"]
    raise OptionError(f"{name} cannot be {shown(value)}")


def _symbols(value: Any) -> Symbols:
    """`{"batch": 1}`, or `[("batch", 1)]`."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, (list, tuple)):
        raise OptionError("onnx_define_symbol must be a list of (symbol, value)")
    symbols = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise OptionError(
                f"onnx_define_symbol must have pairs (symbol, value), not {shown(pair)}"
            )
        symbols.append((str(pair[0]), pair[1]))
    return symbols
