"""`qaicrt.Context` (the devices to use) and `qaicrt.Qpc` (a program container on disk)."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass
from typing import Any, List, Optional, Tuple

from ..card import Card, Machine, NoDevice, timing
from ..container import QpcError
from ..container.netdesc import Binding
from . import recording
from .buffers import BufferMapping, mapping_of
from .types import QDevStatus, QIDList, QLogLevel, QStatus, incompatible

_ids = itertools.count()


class Log:
    """Lines on stderr as the vendor's runtime writes them, from a severity on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.level = QLogLevel.QL_ERROR

    def failure(self, message: str) -> None:
        """Something failed."""
        self._write(QLogLevel.QL_ERROR, "error", message)

    def notice(self, message: str) -> None:
        """Something may fail."""
        self._write(QLogLevel.QL_WARN, "warning", message)

    def detail(self, message: str) -> None:
        """Something happened."""
        self._write(QLogLevel.QL_DEBUG, "debug", message)

    def _write(self, level: QLogLevel, word: str, message: str) -> None:
        if level >= self.level:
            now_s = time.time()
            stamp = (
                f"{time.strftime('%H:%M:%S', time.localtime(now_s))}.{int(now_s * 1e3) % 1000:03}"
            )
            print(f"[{stamp}][{word}][{self.name}]{message}", file=sys.stderr, flush=True)


def init_error(name: str, message: str) -> RuntimeError:
    """The exception of an object that could not be made."""
    return RuntimeError(f"Initialization Exception: in object: {name} {message}")


class Context:
    """Devices to use, a log, and the machine's cards.

    `machine`, `timing` and `recording` are the emulator's own; programs of the vendor's API do not
    see them.
    """

    def __init__(self, devices: Optional[QIDList] = None) -> None:
        if devices is not None and not isinstance(devices, QIDList):
            raise incompatible("Context")
        self._id = next(_ids)
        self.log = Log(f"Aic-{self._id}")
        self.machine = Machine.here()
        self.timing = timing.from_environment()
        self.recording = recording.from_environment()
        self.qids: Tuple[int, ...] = tuple(devices or ())
        present = {card.qid for card in self.machine.cards()}
        for qid in self.qids:
            if qid not in present:
                self.log.failure(f"Invalid Device {qid}")
                raise init_error("Context", "Failed to create Context")

    def setLogLevel(self, level: QLogLevel) -> QStatus:
        """Log from this severity on."""
        if not isinstance(level, QLogLevel):
            raise incompatible("setLogLevel")
        self.log.level = level
        return QStatus.QS_SUCCESS

    def getLogLevel(self) -> QLogLevel:
        """The least severity that is logged."""
        return self.log.level

    def getId(self) -> int:
        """A number of this context in its process."""
        return self._id

    def objName(self) -> str:
        """What kind of object this is."""
        return "Context"

    def findDevice(self, qpc: Qpc) -> int:
        """The first ready device of this context with enough free NSPs; RuntimeError if none."""
        wanted = self.qids or tuple(self.machine.physical_qids)
        cards = {card.qid: card for card in self.machine.cards()}
        ready = [cards[q] for q in wanted if q in cards and self._is_ready(cards[q])]
        if not ready:
            raise RuntimeError("Couldn't find a suitable device")
        for card in ready:
            if card.free.num_nsps >= qpc.contents.num_cores:
                return card.qid
        raise RuntimeError("Couldn't find a suitable device: Not enough NSPs")

    def checkDevice(self, qid: int) -> None:
        """RuntimeError unless the machine has this device."""
        try:
            self.machine.card(qid)
        except NoDevice:
            self.log.failure(f"Invalid Device {qid}")
            raise init_error("Program", "Failed to create program with Qpc Buffer") from None

    @staticmethod
    def _is_ready(card: Card) -> bool:
        return card.status == QDevStatus.QDS_READY


@dataclass
class QpcInfo:
    """What `Qpc.getInfo` tells of a program."""

    name: str
    numCores: int
    size: int
    batchSize: int
    bufferMappings: List[BufferMapping]


class Qpc:
    """A program container on disk, by its folder or by the path of `programqpc.bin`."""

    def __init__(self, path: str) -> None:
        if not isinstance(path, str):
            raise incompatible("Qpc")
        # Imported here: it brings onnxruntime, and who only asks for cards never needs that.
        from ..container import execution

        try:
            self.contents: Any = execution.CompiledProgram.open(path)
        except OSError as error:
            raise RuntimeError(f"Runtime Exception: Failed to open file{path}") from error
        except QpcError as error:
            raise init_error("QpcObj:", f"Failed to open QPC: {error}") from error
        self._io_descriptor: bytes = self.contents.io_descriptor()
        self.bindings: Tuple[Binding, ...] = self.contents.bindings
        self.name_to_binding = {binding.name: binding for binding in self.bindings}

    def getIoDescriptor(self) -> Tuple[QStatus, bytes]:
        """Status and the serialized `IoDesc`."""
        return QStatus.QS_SUCCESS, self._io_descriptor

    def getBufferMappings(self) -> List[BufferMapping]:
        """The buffers of the program, inputs first."""
        return [mapping_of(binding) for binding in self.bindings]

    def getInfo(self) -> QpcInfo:
        """Name, cores, size and buffers."""
        contents = self.contents
        first = self.bindings[0].dims if self.bindings else ()
        return QpcInfo(
            name=contents.name,
            numCores=contents.num_cores,
            size=contents.constants_bytes,
            batchSize=first[0] if first else 1,
            bufferMappings=self.getBufferMappings(),
        )
