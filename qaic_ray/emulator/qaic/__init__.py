"""The vendor's high-level Python module `qaic`: a `Session` of a QPC or of an ONNX file.

Covered: `Session` with every documented option and call, and oversubscription. Inferred: the
default of `set_size`, that the metrics leave the first inference out, and the texts of errors.
"""

from __future__ import annotations

from .session import Session

__all__ = ["Session"]
