"""API keys: who may ask, by a file that holds a digest of each key and never the key."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import read_text

PREFIX = "qr-"
"""Of the keys that we make."""

_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+sha256:(?P<digest>[0-9a-f]{64})")
_HINT = "each line is NAME sha256:DIGEST, as `qaic-ray key NAME` prints it"


class ApiKeys:
    """The keys of a server.

    Args:
        digests: SHA-256 of each key, by the name of who has it.
    """

    def __init__(self, digests: Mapping[str, bytes]) -> None:
        self._digests = dict(digests)

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """The keys of a file.

        Raises:
            UsageError: it cannot be read, holds no key, or a line that is none.
        """
        text = read_text(path, makes=f"qaic-ray key NAME >> {shlex.quote(str(path))}")
        digests: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.partition("#")[0].strip()
            if not words:
                continue
            found = _LINE.fullmatch(words)
            if found is None:
                raise UsageError(f"{path}, line {number}: it holds no key; {_HINT}.")
            if found["name"] in digests:
                raise UsageError(f"{path}, line {number}: {found['name']} has a key already.")
            digests[found["name"]] = bytes.fromhex(found["digest"])
        if not digests:
            raise UsageError(f"{path} holds no key: {_HINT}.")
        return cls(digests)

    def holder(self, authorization: str | None) -> str | None:
        """Whose key a request brings; None for nobody's.

        Every digest is compared, in constant time.

        Args:
            authorization: the header, `Bearer KEY`.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        found = None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def new_key(name: str) -> tuple[str, str]:
    """A key, and its line for a file of keys.

    Raises:
        UsageError: for a name that a line cannot hold.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.fullmatch(line):
        raise UsageError("A key's name is up to 64 letters, digits, dots, _ and -.")
    return key, line
