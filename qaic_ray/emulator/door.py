"""The `qaicrt` module of an installed SDK folder: the emulated runtime beside it, under that name.

Copied to `dev/lib/<machine>/qaicrt.py`. It loads the package by its place, not through sys.path,
so that it works however it was imported itself.
"""

import importlib.util
import pathlib
import sys
from typing import Any

_HERE = pathlib.Path(__file__).resolve().parent


def _load_runtime() -> Any:
    name = "qaic_emulated_sdk"
    folder = _HERE / name
    loaded = sys.modules.get(name)
    if loaded is None or str(folder) not in list(loaded.__path__):
        if loaded is not None:  # another SDK folder's; both may live in one process
            name = f"{name}_{abs(hash(str(folder)))}"
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{folder} is incomplete; install the SDK again")
        package = importlib.util.module_from_spec(spec)
        sys.modules[name] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{name}.qaicrt")


_runtime = _load_runtime()
__all__ = list(_runtime.__all__)
globals().update({name: getattr(_runtime, name) for name in __all__})
