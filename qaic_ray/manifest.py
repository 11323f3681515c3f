"""The manifest of an exported model: what is in a `<base>-kv` folder and what it was made from.

Written by the export, read by whoever compiles or runs. Knows nothing of how either is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qaic_ray.contract import IoContract
from qaic_ray.errors import UsageError

MANIFEST_FILE = "manifest.json"
CUSTOM_IO_FILE = "custom_io.yaml"
VERIFY_FILE = "verify.json"

FORMAT = 2
"""Raised when the same options would give other files, so that older exports are made again."""


@dataclass(frozen=True)
class SourceFile:
    """A weight file as it was when it was read; unchanged status means unchanged content."""

    name: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """The present state of a file."""
        status = path.stat()
        return cls(path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True)
class ModelManifest:
    """One exported model.

    `onnx_file` is relative to the folder. `max_position` is the longest context (`ctx_len`) that
    the graph is right for. `weights_sha256` is over the checkpoint's tensors, however sharded.
    `num_clipped` weights were beyond the range of float16. `sources` tell a later export whether
    the weight files are still the same without reading them. `num_kv_heads` is the cache's: the
    checkpoint's times `num_replicate_kv_heads`. `logits` and `next_tokens` say what the first
    output is, `kv_dtype` what custom_io.yaml asks for, `comp_ctx_lengths` whether there is such an
    input.
    """

    format: int
    name: str
    source: str
    contract: IoContract
    continuous: bool
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    opset: int
    dtype: str
    eos_ids: tuple[int, ...]
    onnx_file: str
    weights_sha256: str
    architecture_sha256: str
    num_clipped: int
    tool_versions: Mapping[str, str]
    sources: tuple[SourceFile, ...]
    kv_dtype: str = "float16"
    logits: str = "last"
    next_tokens: bool = False
    num_replicate_kv_heads: int = 1
    comp_ctx_lengths: bool = False

    def same_making(self, other: ModelManifest) -> bool:
        """Whether both come from equal weights, options, format and tools."""
        return all(getattr(self, name) == getattr(other, name) for name in _KEY)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        fields = asdict(self) | {"contract": self.contract.value}
        return json.dumps(fields, indent=2) + "\n"


_KEY = (
    "format",
    "contract",
    "continuous",
    "opset",
    "dtype",
    "eos_ids",
    "onnx_file",
    "weights_sha256",
    "architecture_sha256",
    "tool_versions",
    "kv_dtype",
    "logits",
    "next_tokens",
    "num_replicate_kv_heads",
    "comp_ctx_lengths",
)


def read_manifest(model_dir: Path) -> ModelManifest:
    """Read the manifest of an exported model.

    Raises:
        UsageError: the folder is not an exported model, or one of another format.
    """
    path = model_dir / MANIFEST_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{model_dir} is not an exported model (it has no {MANIFEST_FILE}); make one with "
            "`qaic-ray export --model-name ...`."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot read {path}: {error}; export the model again.") from error
    try:
        return _from_fields(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a manifest of this version ({error}); export the model again."
        ) from error


def _from_fields(fields: dict[str, Any]) -> ModelManifest:
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']}, not {FORMAT}")
    converted = {
        "contract": IoContract(fields["contract"]),
        "eos_ids": tuple(fields["eos_ids"]),
        "sources": tuple(SourceFile(**entry) for entry in fields["sources"]),
    }
    return ModelManifest(**(fields | converted))
