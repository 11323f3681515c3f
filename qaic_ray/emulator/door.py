"""The `qaicrt` and `qaic` modules of an installed SDK folder: the emulated ones, under those names.

Copied to `dev/lib/<machine>/qaicrt.py` and `qaic.py`, and into the wheel of `qaic`. It loads the
package by its place, not through sys.path, so that it works however it was imported itself.
"""

import importlib.util
import os
import pathlib
import platform
import sys
from typing import Any, Iterator

_PACKAGE = "qaic_emulated_sdk"
_LAID_DOWN = ""  # in a wheel: the SDK folder that it came with


def _places() -> Iterator[pathlib.Path]:
    """Folders that may hold the package: this file's own, else an SDK folder's."""
    yield pathlib.Path(__file__).resolve().parent
    for root in (os.environ.get("QAIC_EMULATED_SDK_ROOT"), _LAID_DOWN, "/opt/qti-aic"):
        if root:
            yield pathlib.Path(root).resolve() / "dev" / "lib" / platform.machine()


def _load_part(part: str) -> Any:
    places = list(_places())
    home = next((place for place in places if (place / _PACKAGE / "__init__.py").exists()), None)
    if home is None:
        raise ImportError(
            f"there is no emulated SDK in {', '.join(map(str, places[1:]))}: set "
            "QAIC_EMULATED_SDK_ROOT to an installed one"
        )
    name = _PACKAGE
    folder = home / name
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
    return importlib.import_module(f"{name}.{part}")


_runtime = _load_part(pathlib.Path(__file__).stem)
__all__ = list(_runtime.__all__)
globals().update({name: getattr(_runtime, name) for name in __all__})
