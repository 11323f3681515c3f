"""What each request goes through, without sockets: names, keys, ids, limits, the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served_app import ask
from thread_cards import formula_fleet, service_of

from qaic_ray.errors import UsageError
from qaic_ray.options import ServeOptions
from qaic_ray.rows import Prompt
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.serve.http.app import create_app
from qaic_ray.serve.http.counted_fleet import CountedFleet
from qaic_ray.serve.http.keys import ApiKeys, new_key
from qaic_ray.serve.http.request_log import logging_to_stderr
from qaic_ray.serve.http.service import Service
from qaic_ray.serve.serving import keys_of

BODY = json.dumps({"prompt": "Hi", "max_tokens": 2, "temperature": 0}).encode()
COMPLETIONS = "/v1/completions"


LOOP = asyncio.new_event_loop()
"""A service answers in one loop."""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with formula_fleet(slots=2) as (fleet, _):
        yield service_of(fleet)


def told(service: Service, path: str = COMPLETIONS, body: bytes | None = BODY, **how: Any) -> Any:
    async def asked() -> Any:
        return await ask(create_app(service), path, body, **how)

    return LOOP.run_until_complete(asked())


def host(name: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", name.encode())]


@pytest.mark.parametrize("name", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"])
def test_a_server_of_this_machine_goes_by_its_names(service: Service, name: str) -> None:
    app = create_app(service)

    async def asked() -> int:
        scope_headers = host(name)
        return (await ask(_renamed(app, scope_headers), COMPLETIONS, BODY)).status

    assert LOOP.run_until_complete(asked()) == 200


@pytest.mark.parametrize("name", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example"])
def test_a_page_that_points_its_name_here_reads_nothing(service: Service, name: str) -> None:
    app = create_app(service)

    async def asked() -> Any:
        return await ask(_renamed(app, host(name)), COMPLETIONS, BODY)

    answer = LOOP.run_until_complete(asked())
    assert answer.status == 403
    assert answer.json()["error"]["type"] == "permission_error"


def _renamed(app: Any, headers: list[tuple[bytes, bytes]]) -> Any:
    async def called(scope: Any, receive: Any, send: Any) -> None:
        others = [pair for pair in scope["headers"] if pair[0] != b"host"]
        await app({**scope, "headers": [*headers, *others]}, receive, send)

    return called


def test_a_client_names_its_request_unless_the_name_could_forge_a_log(service: Service) -> None:
    mine = told(service, headers=[(b"x-request-id", b"mine-1")])
    assert mine.headers["x-request-id"] == "mine-1"
    assert mine.json()["id"] == "cmpl-mine-1"
    forged = told(service, headers=[(b"x-request-id", b"a\nGET /fake 200")])
    assert "\n" not in forged.headers["x-request-id"]
    assert "fake" not in forged.headers["x-request-id"]


def test_a_form_that_a_web_page_can_send_is_refused(service: Service) -> None:
    """A page needs no permission for these types; for JSON it would, and gets none."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        answer = told(service, kind=kind)
        assert answer.status == 400
        assert "Content-Type" in answer.json()["error"]["message"]
    assert not [name for name in told(service).headers if name.startswith("access-control")]


def test_how_the_server_is_needs_no_key_and_what_it_does_does() -> None:
    key, line = new_key("ann")
    name, _, digest = line.partition(" sha256:")
    with formula_fleet(slots=1) as (fleet, _):
        service = service_of(fleet, keys=ApiKeys({name: bytes.fromhex(digest)}))
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert told(service, path, None).status == 200
        for path in ("/v1/models", "/openapi.json", "/docs"):
            assert told(service, path, None).status == 401
        right = [(b"authorization", f"Bearer {key}".encode())]
        assert told(service, "/v1/models", None, headers=right).status == 200
        for wrong in (f"Bearer {key}x", f"Basic {key}", key, "Bearer", "Bearer \xff"):
            headers = [(b"authorization", wrong.encode("latin-1"))]
            assert told(service, "/v1/models", None, headers=headers).status == 401


def test_the_log_has_no_text_of_prompts_unless_it_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = json.dumps({"prompt": "SECRET", "max_tokens": 2}).encode()
    with formula_fleet(slots=1) as (fleet, _):
        for wanted in (False, True):
            service = service_of(fleet, log_prompts=wanted)
            with logging_to_stderr(as_json=True):
                assert told(service, body=secret).status == 200
            lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
            assert any("SECRET" in json.dumps(line) for line in lines) is wanted
            (request,) = [line for line in lines if "status" in line]
            assert (request["status"], request["answer_tokens"]) == (200, 2)
    assert logging.getLogger("qaic_ray.serve").handlers == []


def test_rows_of_batches_are_counted_by_their_card() -> None:
    with formula_fleet(slots=1) as (fleet, _):
        service = service_of(fleet)
        counted = CountedFleet(fleet, service.metrics)
        prompt = Prompt(0, "", token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4))
        row = counted.submit(prompt, wait=True).row(30.0)
        assert row.ok
        name = "vllm:request_generation_tokens_sum"
        families = text_string_to_metric_families(service.exposition().decode())
        seen = {
            sample.labels["engine"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == name
        }
        assert seen[row.worker] == len(row.token_ids)


# -- keys


def test_a_file_of_keys_holds_names_and_digests(tmp_path: Path) -> None:
    (ann, ann_line), (bob, bob_line) = new_key("ann"), new_key("bob")
    path = tmp_path / "keys.txt"
    path.write_text(f"# of the team\n{ann_line}\n\n{bob_line}  # until May\n")
    keys = ApiKeys.read(path)
    assert keys.holder(f"Bearer {ann}") == "ann"
    assert keys.holder(f"bearer  {bob} ") == "bob"
    assert keys.holder(None) is None
    assert ann not in path.read_text()
    assert len({new_key("ann")[0] for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("# none\n", "holds no key"),
        ("qr-abcdef\n", "line 1: it holds no key"),
        (f"a sha256:{'0' * 64}\na sha256:{'1' * 64}\n", "line 2: a has a key already"),
        (f"a b sha256:{'0' * 64}\n", "line 1"),
    ],
)
def test_a_file_that_holds_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        ApiKeys.read(path)


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "a\nb", "ä"])
def test_a_name_that_a_line_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        new_key(name)


def test_strangers_get_in_by_keys_or_by_a_word(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(new_key("ann")[1] + "\n")
    assert keys_of(ServeOptions()) is None
    assert keys_of(ServeOptions(host="0.0.0.0", no_auth=True)) is None
    assert keys_of(ServeOptions(host="0.0.0.0", api_keys=str(path))) is not None
    with pytest.raises(UsageError, match="lets other machines in"):
        keys_of(ServeOptions(host="0.0.0.0"))
    with pytest.raises(UsageError, match="opposite"):
        keys_of(ServeOptions(api_keys=str(path), no_auth=True))
