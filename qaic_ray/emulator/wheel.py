"""The wheel of `qaic` in an SDK folder: one module, which finds the SDK that it came with.

Made without pip or setuptools, and the same bytes for the same content.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from typing import Dict

NAME = "qaic-0.0.1-py3-none-any.whl"
"""As the vendor's is called."""

_INFO = "qaic-0.0.1.dist-info"
_METADATA = """\
Metadata-Version: 2.1
Name: qaic
Version: 0.0.1
Summary: High-level Python interface of an emulated Cloud AI 100 SDK
Requires-Python: >=3.8
Requires-Dist: numpy
Requires-Dist: onnx
Requires-Dist: onnxruntime
Requires-Dist: protobuf
"""
_WHEEL = """\
Wheel-Version: 1.0
Generator: qaic-emulated-sdk
Root-Is-Purelib: true
Tag: py3-none-any
"""
_BEGINNING = (1980, 1, 1, 0, 0, 0)


def build(module: bytes) -> bytes:
    """The wheel whose module `qaic` is this source."""
    files: Dict[str, bytes] = {
        "qaic.py": module,
        f"{_INFO}/METADATA": _METADATA.encode(),
        f"{_INFO}/WHEEL": _WHEEL.encode(),
        f"{_INFO}/top_level.txt": b"qaic\n",
    }
    record = "".join(f"{name},{_hash(data)},{len(data)}\n" for name, data in files.items())
    files[f"{_INFO}/RECORD"] = f"{record}{_INFO}/RECORD,,\n".encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _BEGINNING)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return made.getvalue()


def _hash(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"
