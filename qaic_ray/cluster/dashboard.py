"""Ray's dashboard: where it is, and how a person gets in."""

from __future__ import annotations

import getpass
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray._private import utils
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.worker import RayContext

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_SSH_PORT = "22"

_PATH = "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that answers.

    Attributes:
        url: with `http://`.
        head: the machine that it is on, where that is another one and lets only itself in.
        token_command: what prints the token that it asks for; None where it asks for none.
    """

    url: str
    head: str | None = None
    token_command: str | None = None

    def ways_in(self, environment: Mapping[str, str]) -> list[str]:
        """The URL, the command that brings it to where the user sits, and what it asks for.

        Args:
            environment: SSH_CONNECTION of it tells that the user sits elsewhere.
        """
        ways = [self.url, *self._tunnel(environment)]
        if self.token_command is not None:
            ways.append(f"It asks for a token: {self.token_command}")
        return ways

    def _tunnel(self, environment: Mapping[str, str]) -> list[str]:
        where = urlsplit(self.url)
        host = f"[{where.hostname}]" if ":" in str(where.hostname) else where.hostname
        forward = f"-L {where.port}:{host}:{where.port}"
        if self.head is not None:
            return [f"ssh {forward} {shlex.quote(self.head)}"]
        try:
            _, _, server, port = environment["SSH_CONNECTION"].split()
        except (KeyError, ValueError):
            return []
        at = "" if port == DEFAULT_SSH_PORT else f"-p {port} "
        return [f"ssh {at}{forward} {getpass.getuser()}@{server}"]


def missing() -> str | None:
    """Why this Ray has no dashboard, as a sentence with the remedy; None where it has one."""
    error = utils.get_dashboard_dependency_error()
    if error is None:
        return None
    return (
        f"Ray's dashboard needs packages that `ray` alone does not bring ({error}): "
        "`pip install 'ray[default]'` does."
    )


def dashboard_of(context: RayContext, token_file: Path | None) -> Dashboard:
    """The dashboard of a Ray that this process has joined, and which has one.

    Args:
        context: as `ray.init` gave it.
        token_file: of a Ray of ours; None for what the environment names, or Ray would look for.
    """
    url = f"http://{context.dashboard_url}"
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
    here = (*LOOPBACK, ray.util.get_node_ip_address())
    is_elsewhere = urlsplit(url).hostname in LOOPBACK and head not in here
    command = None
    if is_token_auth_enabled():
        # A job of the Ray that is kept has the file in its environment; a person's shell has not.
        file = token_file or (None if "RAY_AUTH_TOKEN" in os.environ else os.environ.get(_PATH))
        command = "ray get-auth-token" if file is None else f"cat {shlex.quote(str(file))}"
    return Dashboard(url, head if is_elsewhere else None, command)
