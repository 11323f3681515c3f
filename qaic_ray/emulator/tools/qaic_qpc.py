"""`qaic-qpc`: what is in a program container; works without a card.

Covered: `validate -i FILE`, and `extract --qpc FILE --output-dir DIR [-s PATTERN]...`. The exact
text of the vendor's tool is not public but for the line `Number of NSP required`. Segments are
written under their names, and the network descriptor also as JSON.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple

from ..container import NETWORK_DESC, QpcError, netdesc, read_qpc

_ALIASES = {"constants.bin": "StaticConstants.constants.bin"}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; its exit status."""
    asked = _parser().parse_args(argv)
    try:
        if asked.command == "validate":
            return _validate(asked.input)
        return _extract(asked.qpc, Path(asked.output_dir), asked.segment)
    except (QpcError, OSError) as error:
        print(f"Failed to open QPC: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qaic-qpc")
    commands = parser.add_subparsers(dest="command", required=True)
    validate = commands.add_parser("validate", help="check a QPC and show what it needs")
    validate.add_argument("-i", "--input", required=True)
    extract = commands.add_parser("extract", help="write the segments of a QPC to files")
    extract.add_argument("--qpc", required=True)
    extract.add_argument("--output-dir", required=True)
    extract.add_argument("-s", "--segment", action="append", default=[])
    return parser


def _read(path: str) -> Tuple[Dict[str, bytes], netdesc.Network]:
    path, segments = read_qpc(path)
    if NETWORK_DESC not in segments:
        raise QpcError(f"{path} has no segment {NETWORK_DESC}")
    return segments, netdesc.parse(segments[NETWORK_DESC])


def _validate(path: str) -> int:
    segments, network = _read(path)
    print(f"Network name: {network.name}")
    print(f"Number of NSP required: {network.num_cores}")
    print(f"Batch size: {network.batch_size}")
    for name, content in segments.items():
        print(f"Segment {name}: {len(content)} bytes")
    return 0


def _extract(path: str, target: Path, patterns: Sequence[str]) -> int:
    segments, network = _read(path)
    files: Dict[str, bytes] = {_ALIASES.get(name, name): data for name, data in segments.items()}
    files[f"{NETWORK_DESC}_dir/networkdesc.json"] = _as_json(network).encode()
    for name, content in files.items():
        if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            _write(target, name, content)
    return 0


def _write(target: Path, name: str, content: bytes) -> None:
    """Write a file below `target`; QpcError for a name or a link that leads elsewhere."""
    file = target / name
    root = os.path.realpath(target)
    if os.path.commonpath([root, os.path.realpath(file.parent)]) != root or ".." in file.parts:
        raise QpcError(f"segment {name!r:.80} leads out of {target}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(file):
        raise QpcError(f"{file} is a link")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(file, flags, 0o666), "wb") as stream:
        stream.write(content)


def _as_json(network: netdesc.Network) -> str:
    def ios(each: Sequence[netdesc.Io]) -> list[dict[str, object]]:
        return [{"name": io.name, "type": io.type, "dims": list(io.dims)} for io in each]

    shapes = [
        {"shapes": [{"type": type_, "dims": list(dims)} for type_, dims in entry]}
        for entry in network.allowed_shapes
    ]
    content = {
        "network_name": network.name,
        "inputs": ios(network.inputs),
        "outputs": ios(network.outputs),
        "num_cores": network.num_cores,
        "batch_size": network.batch_size,
        "allowed_shapes": shapes,
    }
    return json.dumps(content, indent=2)
