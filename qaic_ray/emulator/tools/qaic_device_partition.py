"""`qaic-device-partition`: a derived device (QID 100 and up) of part of a card, while it runs.

Covered: -p (JSON with all six sizes), -q (sized to the largest QPC), -d, -h. The multicast ids,
semaphores and L2 region that are asked for are checked, and not counted.
"""

from __future__ import annotations

import getopt
import signal
import sys
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ..card import Claim, Demand, Exhausted, Machine, NoDevice
from ..card.faults import FaultFileError
from ..container import QpcError
from ..documents import is_number, parse_json, read_text
from ..folder import FolderError

USAGE = """\
Usage: qaic-partition [options]
  -p, --partition-config <path>      File path to the partition config json.
  -d, --aic-device-id                Optional qaic devices id. Default: Apply to all devices
  -q, --program-qpc                  Path to the program QPC. this param can be repeated. The
                                     reservation will correspond to the largest program requested.
                                     'partition-config' takes precedence over this param.
  -h, --help                         help
"""

_KEYS = ("ddrSize", "numNsp", "numMcid", "numSem", "numVc", "l2Region")
_OPTIONAL_KEYS = ("numNetworks",)
_MIB = 1 << 20


class PartitionError(ValueError):
    """The partitions cannot be made; the message says why."""


class Reservation(NamedTuple):
    """A parsed command line."""

    config: str = ""
    qid: Optional[int] = None
    programs: Tuple[str, ...] = ()


def main(argv: Sequence[str]) -> int:
    """Make the partitions and hold them until a signal ends the process."""
    request = _parse(argv)
    if request is None:
        print(USAGE, end="")
        return 0
    if not request.config and not request.programs:
        print("Invalid config")
        print(USAGE, end="")
        return 0
    try:
        claims = _reserve(request)
    except (PartitionError, FolderError, FaultFileError) as error:
        print(error, file=sys.stderr)
        claims = []
    if not claims:
        print("Failed to create partitions!")
        return 1
    print("Running... ", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        return 0
    return 0


def _parse(argv: Sequence[str]) -> Optional[Reservation]:
    try:
        long_names = ["partition-config=", "aic-device-id=", "program-qpc=", "help"]
        options, _ = getopt.gnu_getopt(list(argv), "p:d:q:h", long_names)
    except getopt.GetoptError as error:
        print(f"qaic-device-partition: {error}", file=sys.stderr)
        return None
    request = Reservation()
    for name, value in options:
        if name in {"-p", "--partition-config"}:
            request = request._replace(config=value)
        elif name in {"-d", "--aic-device-id"}:
            request = request._replace(qid=int(value) if value.isdigit() else 0)
        elif name in {"-q", "--program-qpc"}:
            request = request._replace(programs=(*request.programs, value))
        else:
            return None
    return request


def _reserve(request: Reservation) -> List[Claim]:
    machine = Machine.here()
    demand = _from_config(request.config) if request.config else _from_qpcs(request.programs)
    qids = machine.physical_qids if request.qid is None else [request.qid]
    claims = []
    for qid in qids:
        try:
            claims.append(machine.reserve(qid, demand)[1])
        except (Exhausted, NoDevice):
            print(f"Failed to create reservation {qid}, {demand.num_nsps}", file=sys.stderr)
    return claims


def _from_config(path: str) -> Demand:
    config = parse_json(read_text(path, PartitionError), path, PartitionError)
    if not isinstance(config, dict):
        raise PartitionError(f"{path} must be a JSON object")
    for key in config:
        if key not in _KEYS + _OPTIONAL_KEYS:
            raise PartitionError(f"Invalid config detected {key[:40]}")
    for key in _KEYS:
        value = config.get(key)
        if not isinstance(value, int) or not is_number(value) or value < 0:
            raise PartitionError(f"{path}: {key} must be a number of 0 or more")
    return Demand(config["numNsp"], config["ddrSize"] * _MIB, config["numVc"])


def _from_qpcs(paths: Sequence[str]) -> Demand:
    from ..container import execution

    demands = []
    for path in paths:
        try:
            contents = execution.CompiledProgram.open(path)
        except (OSError, QpcError) as error:
            raise PartitionError(f"Failed to open qpc binary file {path}: {error}") from error
        dram_bytes = contents.constants_bytes + contents.activation_bytes
        demands.append(Demand(contents.num_cores, dram_bytes, 1))
    return Demand(*(max(values) for values in zip(*demands)))
