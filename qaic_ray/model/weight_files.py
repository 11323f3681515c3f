"""Which files of a checkpoint's folder hold its weights, as transformers chooses them.

A folder that is something else, such as an adapter, is named for what it is. Opens no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qaic_ray.documents import read_object, shown
from qaic_ray.errors import CheckpointError

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHOSEN_KEY = "transformers_weights"
"""Of config.json: a file that transformers takes instead of these two."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a checkpoint.

    Raises:
        CheckpointError: it says what the folder holds.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter (adapter_config.json); merge it into its base model "
            "first (merge_and_unload, then save_pretrained) and give the merged folder."
        )
    if (folder / "hf_quant_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds weights quantized by ModelOpt (hf_quant_config.json); use the "
            "original float weights (the compiler quantizes with mx6)."
        )
    if (folder / "config.json").is_file():
        return
    if (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} holds a diffusers pipeline (model_index.json), which is no language model."
        )
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if found:
        raise CheckpointError(
            f"{folder} has no config.json, but GGUF files: give the file, {folder / found[0]}."
        )
    raise CheckpointError(f"{folder} is no checkpoint: it has no config.json.")


def find_weights(folder: Path, config: Mapping[str, Any]) -> tuple[Path, ...]:
    """The safetensors files of a folder; a name in an index may not lead out of it.

    Raises:
        CheckpointError: there are none, or one of them is missing.
    """
    chosen = config.get(CHOSEN_KEY)
    if chosen is not None:
        what = f"config.json of {folder} ({CHOSEN_KEY})"
        if isinstance(chosen, str) and chosen.endswith(".index.json"):
            return _shards(_inside(folder, chosen, what, ".index.json"))
        return (_inside(folder, chosen, what),)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
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
            f"{folder} has no {SINGLE}, but {odd[0]}: rename it, if it holds the whole model under "
            "the names of transformers."
        )
    if odd:
        return (
            f"{folder} has {len(odd)} safetensors files but no {INDEX} that says which tensor is "
            "where."
        )
    pickled = [name for name in found if name.endswith(PICKLED_SUFFIXES)]
    if pickled:
        return (
            f"{folder} holds only pickled weights ({pickled[0]}), and opening a pickle can run any "
            "code; convert them to safetensors with a tool you trust, or take a revision that has "
            "safetensors."
        )
    return f"{folder} holds no weights: no {SINGLE} is there."
