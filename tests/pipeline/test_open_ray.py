"""Which Ray a step gets, and what is said of its dashboard: without a Ray."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qaic_ray.cluster import cluster, dashboard, kept_ray
from qaic_ray.cluster.dashboard import Dashboard
from qaic_ray.errors import DeviceError, UsageError
from qaic_ray.options import LocalRayOptions, RayOptions
from qaic_ray.pipeline.open_ray import open_ray


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *what: self.said.append((name, *what))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Rays were asked for; each has a dashboard where one was wanted."""
    calls: list[dict[str, Any]] = []

    def made(num_cards: int, **how: Any) -> Any:
        calls.append({"num_cards": num_cards, **how})
        shown = Dashboard("http://127.0.0.1:8266", token_command="cat /t")
        return nullcontext(SimpleNamespace(dashboard=shown if how["dashboard"] else None))

    monkeypatch.setattr(cluster, "Cluster", made)
    monkeypatch.setattr(kept_ray, "usable", lambda _: (None, None))
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    return calls


def opened(ray: RayOptions | LocalRayOptions, devices: Any = lambda: [1, 2]) -> list[Any]:
    told, sdk = Told(), SimpleNamespace(devices=devices)
    with open_ray(ray, 2, name="nightly", sdk=sdk, listener=told):  # type: ignore[arg-type]
        return told.said


def test_a_new_one_says_where_its_dashboard_is(asked: list[dict[str, Any]]) -> None:
    said = opened(RayOptions())
    assert said[-1] == (
        "dashboard",
        ["http://127.0.0.1:8266", "It asks for a token: cat /t"],
    )
    (how,) = asked
    assert (how["num_cards"], how["name"], how["dashboard"]) == (2, "nightly", True)
    assert opened(LocalRayOptions(dashboard=False)) == [("began", "Ray"), ("ended", "Ray")]


def test_one_that_is_kept_and_does_not_fit_is_said(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_ray, "usable", lambda _: (None, "It is old."))
    assert ("remark", "It is old.") in opened(RayOptions(dashboard=False))
    assert asked[0]["kept"] is None
    opened(RayOptions(address="10.0.0.1:6379"))  # nobody asks for it there
    assert asked[1]["address"] == "10.0.0.1:6379"


def no_driver() -> list[int]:
    raise DeviceError("The driver is not loaded.")


@pytest.mark.parametrize(("devices", "offered"), [(lambda: [0, 1, 2, 3], 4), (no_driver, 2)])
def test_one_to_be_kept_offers_every_card_of_the_machine(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, devices: Any, offered: int
) -> None:
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(kept_ray, "start", lambda n, *, wanted: started.append((n, wanted)) or "it")
    said = opened(LocalRayOptions(keep_ray=True), devices)
    assert started == [(offered, 2)]
    assert asked[0]["kept"] == "it"
    assert ("ended", "Ray, which stays: `qaic-ray ray stop` ends it") in said
    with pytest.raises(UsageError, match="leave out it or --address"):
        opened(RayOptions(keep_ray=True, address="auto"))


def test_packages_that_are_missing_are_said_and_no_run_ends_of_it(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ImportError("No module named 'aiohttp_cors'")
    monkeypatch.setattr(dashboard.utils, "get_dashboard_dependency_error", lambda: error)
    (_, sentence), *_ = opened(RayOptions())
    assert sentence == (
        "Ray's dashboard needs packages that `ray` alone does not bring (No module named "
        "'aiohttp_cors'): `pip install 'ray[default]'` does."
    )
    assert asked[0]["dashboard"] is False
    with pytest.raises(UsageError, match=r"pip install 'ray\[default\]'"):
        opened(RayOptions(keep_ray=True))


@pytest.mark.parametrize(
    ("url", "head", "connection", "line"),
    [
        ("http://127.0.0.1:8265", None, "1.1.1.1 5 2.2.2.2 22", r"ssh -L 8265:127.* \S+@2.2.2.2"),
        ("http://127.0.0.1:8265", None, "1.1.1.1 5 2.2.2.2 2222", r"ssh -p 2222 -L 8265:.*"),
        ("http://10.0.0.9:8265", None, "1.1.1.1 5 2.2.2.2 22", r"ssh -L 8265:10\.0\.0\.9:8265 .*"),
        ("http://[::1]:8265", None, "1.1.1.1 5 2.2.2.2 22", r"ssh -L 8265:\[::1\]:8265 .*"),
        ("http://127.0.0.1:8265", "10.0.0.1", "", r"ssh -L 8265:127\.0\.0\.1:8265 10\.0\.0\.1"),
        ("http://127.0.0.1:8265", None, "", None),
        ("http://127.0.0.1:8265", None, "nonsense", None),
    ],
)  # fmt: skip
def test_the_way_from_another_machine(
    url: str, head: str | None, connection: str, line: str | None
) -> None:
    ways = Dashboard(url, head).ways_in({"SSH_CONNECTION": connection} if connection else {})
    assert ways[0] == url
    assert len(ways) == (1 if line is None else 2)
    assert line is None or re.fullmatch(line, ways[1])


def test_the_pages_pictures_are_there() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = docs / "how-to" / "dashboard.md"
    named = {word.partition(")")[0] for word in page.read_text().split("](")[1:]}
    assert {name for name in named if not (page.parent / name).exists()} == set()
    assert sum(path.stat().st_size for path in (docs / "pictures").iterdir()) < 10**6
