"""`qaic-version-util`: the versions of the SDK folder, as the vendor's tool prints them.

Covered: no option, `--apps`, `--platform`, `--factory`, `-h`. Inferred: the status of a version
that is not there (1), and the help.
"""

from __future__ import annotations

import getopt
import sys
from typing import Dict, Optional, Sequence

from ..documents import read_text
from ..folder import FolderError, current

USAGE = """\
Usage: qaic-version-util [options]
  --platform                  Version of the Platform SDK
  --apps                      Version of the Apps SDK
  --factory                   Version of the factory image
  -h, --help                  help
"""
_PARTS = ("platform", "apps", "factory")


def main(argv: Sequence[str]) -> int:
    """Print the versions that are asked for, all by default; 1 for one that is not there."""
    try:
        options, rest = getopt.gnu_getopt(list(argv), "h", [*_PARTS, "help"])
        if rest:
            raise getopt.GetoptError(f"unexpected argument '{rest[0]}'")
    except getopt.GetoptError as error:
        print(f"qaic-version-util: {error}\n{USAGE}", end="", file=sys.stderr)
        return 1
    asked = [name[2:] for name, _ in options if name[2:] in _PARTS]
    if len(asked) < len(options):
        print(USAGE, end="")
        return 0
    try:
        found = _versions()
    except FolderError as error:
        print(error, file=sys.stderr)
        return 1
    for part in asked or _PARTS:
        version = found[part]
        print(f"{part}:{'not found' if version is None else f'AIC.{version}'}")
    return int(any(found[part] is None for part in asked))


def _versions() -> Dict[str, Optional[str]]:
    root = current().root
    found: Dict[str, Optional[str]] = dict.fromkeys(_PARTS)
    for part in ("platform", "apps"):
        text = read_text(str(root / "versions" / f"{part}.xml"), FolderError)
        base = text.partition("<base_version>")[2].partition("</base_version>")[0].strip()
        build = text.partition("<build_id>")[2].partition("</build_id>")[0].strip()
        found[part] = f"{base}.{build}" if base else None
    return found
