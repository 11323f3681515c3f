"""The manifest of an exported model: what is in a `<base>-kv` folder and what it was made from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qaic_ray.contract import IoContract
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import checked, read_object, shown
from qaic_ray.files.folders import KeptFile, SourceFile, first_fault, inside

MANIFEST_FILE = "manifest.json"
CUSTOM_IO_FILE = "custom_io.yaml"
VERIFY_FILE = "verify.json"

FORMAT = 2
"""Raised when equal options would give other files, so that older exports are made again."""


@dataclass(frozen=True)
class ModelManifest:
    """One exported model.

    `onnx_file` is relative to the folder. `max_position` is the longest context (`ctx_len`) that
    the graph is correct for. `weights_sha256` is over the checkpoint's tensors, however sharded.
    `num_clipped` weights were beyond the range of float16. `sources` tell a later export whether
    the weight files have changed, without reading them. `files` are the export's own; older
    versions list none. `num_kv_heads` is that of the KV cache: the checkpoint's times
    `num_replicate_kv_heads`. `logits` and `next_tokens` describe the first output, `kv_dtype` is
    what custom_io.yaml asks for, `comp_ctx_lengths` tells whether there is such an input.
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
    files: tuple[KeptFile, ...] = ()

    def same_making(self, other: ModelManifest) -> bool:
        """Whether weights, options, format and tools are equal."""
        names = (field.name for field in fields(self) if field.name not in _WHENCE)
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        document = asdict(self) | {"contract": self.contract.value}
        return json.dumps(document, indent=2) + "\n"


_WHENCE = {"name", "source", "sources", "num_clipped", "files"}
"""Fields that may differ between two equal exports."""


def read_manifest(model_dir: Path) -> ModelManifest:
    """Read the manifest of an exported model.

    Raises:
        UsageError: the folder is not an exported model, or one of another format.
    """
    path = model_dir / MANIFEST_FILE
    if not os.path.lexists(path):
        raise UsageError(
            f"{model_dir} is not an exported model (it has no {MANIFEST_FILE}); make one with "
            "`qaic-ray export --model-name ...`."
        )
    try:
        document = read_object(path)
        if document.get("format") != FORMAT:
            raise UsageError(f"{path} has format {shown(document.get('format'))}, not {FORMAT}.")
        manifest = checked(ModelManifest, document, str(path))
        inside(manifest.onnx_file)
    except (UsageError, ValueError) as error:
        raise UsageError(f"{str(error).rstrip('.')}; export the model again.") from error
    return manifest


def check_files(model_dir: Path, manifest: ModelManifest) -> None:
    """Check that the files of an exported model are what was written.

    Raises:
        UsageError: naming a file that is not.
    """
    fault = first_fault(model_dir, manifest.files)
    if fault:
        raise UsageError(f"{fault} in {model_dir}: export the model again.")
