"""What the compiled step may use on this processor, and whether there is a compiler for it.

llvmlite is optional: the SDK's folder works without it, and so does a processor that has no kernels
here; both compute with onnxruntime then. `QAIC_EMULATOR_CPU` makes this machine a lesser one: it is
LLVM's name of a processor and its features, like `haswell,+avx2,+fma,+f16c`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from typing import NamedTuple, Optional

AVX512, AVX2, GENERIC = "avx512", "avx2", "generic"
CPU_VARIABLE = "QAIC_EMULATOR_CPU"


class Processor(NamedTuple):
    """`kind` is `AVX512` (with VNNI), `AVX2` or `GENERIC`; `permutes` says whether it has VBMI."""

    kind: str
    permutes: bool
    name: str

    @property
    def multiplies_bytes(self) -> bool:
        """Whether there is a kernel for 8-bit activations."""
        return self.kind != GENERIC


@functools.lru_cache(maxsize=None)
def processor() -> Optional[Processor]:
    """This machine's processor; None where no step can be compiled for it."""
    try:
        from llvmlite import binding
    except ImportError:
        return None
    if not hasattr(binding, "create_pass_builder"):
        return None  # llvmlite before 0.44
    name = os.environ.get(CPU_VARIABLE, "").partition(",")[0] or binding.get_host_cpu_name()
    if platform.machine() not in ("x86_64", "AMD64"):
        return Processor(GENERIC, False, name)
    has = {part[1:] for part in features().split(",") if part.startswith("+")}
    if not {"avx2", "fma", "f16c"} <= has:
        return None
    if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= has:
        return Processor(AVX512, "avx512vbmi" in has, name)
    return Processor(AVX2, False, name)


@functools.lru_cache(maxsize=None)
def features() -> str:
    """LLVM's list of what the processor has, like `+avx2,-avx512f`."""
    named = os.environ.get(CPU_VARIABLE, "").partition(",")[2]
    if named:
        return named
    from llvmlite import binding

    return str(binding.get_host_cpu_features().flatten())


@functools.lru_cache(maxsize=None)
def sources_digest() -> str:
    """A digest of the kernels' sources."""
    folder = os.path.dirname(os.path.abspath(__file__))
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()
