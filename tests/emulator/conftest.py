"""Fixtures of the emulated SDK's tests: an installed folder, cards of its own, a fake program."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import fake_program
import pytest

from qaic_ray.emulator import container, folder
from qaic_ray.emulator.card import Machine
from qaic_ray.emulator.install import install

_VARIABLES = ("QAIC_EMULATOR_FAULTS", "QAIC_EMULATOR_TIMING", "QAIC_SERIALIZE_DEVICE")


@pytest.fixture(scope="session")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed SDK folder with four Standard cards."""
    root = tmp_path_factory.mktemp("sdk") / "qti-aic"
    install(root)
    return root


@pytest.fixture
def machine(sdk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Idle cards that no other test sees; when the test ends they must be idle again."""
    monkeypatch.setenv(folder.ROOT_VARIABLE, str(sdk))
    monkeypatch.setenv(folder.STATE_VARIABLE, str(tmp_path / "state"))
    for variable in _VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    found = Machine.here()
    yield found
    assert all(card.free == card.total for card in found.cards())


@pytest.fixture
def write_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a text to a file and names it in an environment variable."""

    def write(variable: str, text: str) -> None:
        path = tmp_path / f"{variable}.yaml"
        path.write_text(text)
        monkeypatch.setenv(variable, str(path))

    return write


@pytest.fixture
def qaicrt(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runtime, over the fake program."""
    monkeypatch.setattr(container, "execution", fake_program, raising=False)
    return importlib.import_module("qaic_ray.emulator.qaicrt")
