"""When the compiled kernels are there: once a process has chosen enough tokens to be worth it.

numba takes a quarter of a second to import, and seconds to compile what its cache has not yet. So
nobody waits for it: numpy chooses the same tokens meanwhile, and a process of few tokens never
begins. `NUMBA_DISABLE_JIT=1` leaves all of it to numpy.
"""

from __future__ import annotations

import importlib
import logging
import threading
from types import ModuleType

_log = logging.getLogger(__name__)

ENOUGH_TOKENS = 2000


class KernelLoader:
    """Loads the kernels of a process, in a thread of its own.

    Args:
        enough_tokens: chosen by numpy before it begins.
        module: what is imported; it has a class `Compiled` and says whether it `is_compiled`.
    """

    def __init__(
        self, enough_tokens: int = ENOUGH_TOKENS, module: str = "qaic_ray.engine.compiled.chooser"
    ) -> None:
        self._missing = enough_tokens
        self._module = module
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loaded: ModuleType | None = None

    def kernels(self, num_tokens: int) -> ModuleType | None:
        """The kernels, or None where numpy is to choose these tokens."""
        loaded = self._loaded
        if loaded is None and self._thread is None:
            # Threads that count at the same time may lose a token; one of them begins.
            self._missing -= num_tokens
            if self._missing <= 0:
                self._begin()
        return loaded

    def wait(self) -> ModuleType | None:
        """The kernels, loaded now; None where that is not possible."""
        self._begin()
        assert self._thread is not None
        self._thread.join()
        return self._loaded

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._load, name="qaic-ray-kernels")
                self._thread.start()

    def _load(self) -> None:
        _log.info("Loading compiled kernels for sampling; compiling them, once, takes seconds.")
        try:
            module = importlib.import_module(self._module)
        except (ImportError, OSError) as error:
            _log.warning("Sampling goes on with numpy, which is slower: %s", error)
            return
        if module.IS_COMPILED:
            self._loaded = module
        else:
            _log.info("NUMBA_DISABLE_JIT is set: sampling goes on with numpy.")


KERNELS = KernelLoader()
"""Those of this process; an engine per card may share them."""
