"""Which emulated SDK folder this process belongs to: its root, version, cards and state folder.

The only mark that a folder is emulated is the file `emulated-sdk.json` at its root.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional, Tuple

from .documents import parse_json, read_text

MARKER = "emulated-sdk.json"
ROOT_VARIABLE = "QAIC_EMULATED_SDK_ROOT"
STATE_VARIABLE = "QAIC_EMULATOR_STATE"


class FolderError(RuntimeError):
    """There is no emulated SDK folder here, or its state folder cannot be used."""


class Folder(NamedTuple):
    """An installed emulated SDK; `numerics` says how its cards compute."""

    root: Path
    apps_version: str
    num_cards: int
    sku: str
    numerics: str = "exact"

    @property
    def version(self) -> Tuple[int, ...]:
        """`apps_version` as numbers, for comparing."""
        return tuple(int(part) for part in self.apps_version.split("."))

    def state_dir(self) -> Path:
        """The folder where the processes of this machine share the state of the cards.

        `QAIC_EMULATOR_STATE`, else one under the system's temporary folder by user and SDK root.
        """
        named = os.environ.get(STATE_VARIABLE)
        if named:
            state = Path(named)
        else:
            digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:16]
            state = Path(tempfile.gettempdir(), f"qaic-emulator-{os.getuid()}-{digest}")
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = state.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise FolderError(
                f"{state} belongs to someone else; set {STATE_VARIABLE} to a folder of yours"
            )
        return state


def read(root: Path) -> Optional[Folder]:
    """The emulated SDK at `root`, or None when there is no marker of ours."""
    path = root / MARKER
    if not path.exists():
        return None
    marker = parse_json(read_text(str(path), FolderError), str(path), FolderError)
    try:
        return Folder(
            root=root.resolve(),
            apps_version=str(marker["apps_version"]),
            num_cards=int(marker["cards"]),
            sku=str(marker["sku"]),
            numerics=str(marker.get("numerics", "exact")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FolderError(f"{path} is damaged ({error!r:.80}); install the SDK again") from error


def current() -> Folder:
    """The SDK folder this code is installed in, else the one named by `QAIC_EMULATED_SDK_ROOT`."""
    installed = Path(__file__).resolve().parents
    candidates = [installed[4]] if len(installed) > 4 else []
    named = os.environ.get(ROOT_VARIABLE)
    if named:
        candidates.append(Path(named))
    for root in candidates:
        found = read(root)
        if found is not None:
            return found
    raise FolderError(f"no emulated SDK folder: set {ROOT_VARIABLE} to an installed one")
