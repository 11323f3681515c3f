"""What the compiled step may use on this processor, and whether there is a compiler for it.

numba is optional: the SDK's folder works without it, and so does a processor that has no kernels
here; both compute with onnxruntime then. `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` are numba's own
switches, and hold here too.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from typing import FrozenSet, NamedTuple, Optional

AVX512, AVX2, GENERIC = "avx512", "avx2", "generic"


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
        import numba
        from llvmlite import binding
    except ImportError:
        return None
    name = numba.config.CPU_NAME or binding.get_host_cpu_name()
    features = _features(numba.config.CPU_FEATURES, binding)
    if platform.machine() not in ("x86_64", "AMD64"):
        return Processor(GENERIC, False, name)
    if not {"avx2", "fma", "f16c"} <= features:
        return None
    if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features:
        return Processor(AVX512, "avx512vbmi" in features, name)
    return Processor(AVX2, False, name)


def _features(text: Optional[str], binding: object) -> FrozenSet[str]:
    if text is None:
        found = binding.get_host_cpu_features()  # type: ignore[attr-defined]
        return frozenset(name for name, has in found.items() if has)
    return frozenset(part[1:] for part in text.split(",") if part.startswith("+"))


@functools.lru_cache(maxsize=None)
def sources_digest() -> str:
    """A digest of the kernels' sources; numba's cache looks at one file only."""
    folder = os.path.dirname(os.path.abspath(__file__))
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()
