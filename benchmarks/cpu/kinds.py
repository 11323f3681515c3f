"""Who takes part in the benchmark: ours by precision and numerics, and the peers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpu import preparation
from cpu.contender import script
from cpu.figures import PEER
from cpu.preparation import PeerMissing

from qaic_ray.model.checkpoint import Checkpoint

PEERS = ("llama.cpp", "transformers", "openvino")
TRANSFORMERS, OPENVINO = "transformers float32", "OpenVINO int8"
ON_ONNXRUNTIME = "qaic_ray on onnxruntime"
KERNELS_VARIABLE = "QAIC_EMULATOR_KERNELS"
NUMERICS_VARIABLE, THREADS_VARIABLE = "QAIC_EMULATOR_NUMERICS", "QAIC_EMULATOR_THREADS"


@dataclass(frozen=True)
class Kind:
    """A contender before it is started: ours if it has a precision."""

    name: str
    command: list[str]
    environment: dict[str, str]
    opening: dict[str, Any]
    precision: str = ""
    numerics: str = ""
    is_slow: bool = False


def our_kinds(options: argparse.Namespace) -> list[Kind]:
    """Ours, by precision and numerics; what numerics means is said of MXFP6 weights."""
    found = []
    for precision in options.precision:
        for numerics in options.numerics if precision == "mx6" else options.numerics[:1]:
            environment = {**os.environ, THREADS_VARIABLE: str(options.threads)}
            environment[NUMERICS_VARIABLE] = numerics
            command = [sys.executable, script("ours.py")]
            name = f"qaic_ray {precision} {numerics}"
            found.append(Kind(name, command, environment, {}, precision, numerics))
    if options.onnxruntime:
        environment = {**found[0].environment, KERNELS_VARIABLE: "onnxruntime"}
        found.append(replace(found[0], name=ON_ONNXRUNTIME, environment=environment))
    return found


def peer_kinds(options: argparse.Namespace, checkpoint: Checkpoint, notes: list[str]) -> list[Kind]:
    """The peers that can be set up here; a note says why one cannot."""
    environment, threads = dict(os.environ), options.threads
    model = {"checkpoint": str(checkpoint.folder), "threads": threads, "exports": ""}

    def llama_cpp() -> Kind:
        python = preparation.peer_python(options.folder / "llama.cpp", preparation.LLAMA_CPP)
        gguf = preparation.q8_0_file(options.folder, checkpoint)
        opening = {"gguf": str(gguf), "threads": threads}
        return Kind(PEER, [str(python), script("llama_cpp.py")], environment, opening)

    def transformers() -> Kind:
        opening = model | {"kind": "transformers"}
        command = [sys.executable, script("generate.py")]
        return Kind(TRANSFORMERS, command, environment, opening, is_slow=True)

    def openvino() -> Kind:
        folder = options.folder / "openvino"
        python = preparation.peer_python(folder, preparation.OPENVINO, sees_ours=True)
        exports = options.folder / f"{checkpoint.base}-openvino-int8"
        opening = model | {"kind": "openvino", "exports": str(exports)}
        command = [str(python), script("generate.py")]
        return Kind(OPENVINO, command, environment, opening, is_slow=True)

    makers = {"llama.cpp": llama_cpp, "transformers": transformers, "openvino": openvino}
    found = []
    for name in options.peers:
        try:
            found.append(makers[name]())
        except PeerMissing as error:
            notes.append(f"{name} is left out: {error}")
    return found


def peer_versions(kinds: Sequence[Kind]) -> dict[str, dict[str, str]]:
    """Versions of what each peer is made of."""
    packages = {
        PEER: preparation.LLAMA_CPP,
        TRANSFORMERS: ("transformers", "torch"),
        OPENVINO: (*preparation.OPENVINO, "transformers", "torch"),
    }
    return {
        kind.name: preparation.versions(kind.command[0], packages[kind.name])
        for kind in kinds
        if kind.name in packages
    }
