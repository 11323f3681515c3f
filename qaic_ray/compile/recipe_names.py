"""The names that the published recipe's scripts gave a QPC, as links to our folder beside them.

Their names lack the precision, so two variants may have one of them: the one compiled last has it,
as with the scripts.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from qaic_ray.compile.compiler import Variant
from qaic_ray.compile.store import VARIANT_FILE, BuildRequest
from qaic_ray.option_types import Precision

_OUR_NAME = re.compile(r"[^/]+pl-[^/]+cl-[0-9]+c-[0-9]+BS-([^/]+-)?(mx6|fp16)", re.ASCII)


def recipe_names(variant: Variant) -> list[str]:
    """What `compileModel.sh` called the variant, in its first version and in its later ones.

    They name the first specialization. There is none for what the recipe cannot run: slots, fp32.
    """
    first = variant.specializations.entries[0]
    if variant.specializations.continuous or variant.precision is Precision.FP32:
        return []
    shapes = f"{first.seq_len}pl-{first.ctx_len}cl-{variant.num_cores}c"
    name = f"{variant.source.name}-{shapes}"
    return [name, f"{name}-{first.batch_size}BS"]


def link_recipe_names(request: BuildRequest) -> list[str]:
    """Lead the recipe's names to a variant's folder, which is there.

    Only links of ours are replaced, each in one move.

    Returns:
        A sentence for each name that led to another variant, or cannot lead to this one.
    """
    target = request.target
    moved: dict[str, list[str]] = {}
    said = []
    for name in recipe_names(request.variant):
        link = target.with_name(name)
        before = led_to(link)
        if before is None and os.path.lexists(link):
            said.append(f"{link} is not a link of ours, and stays: the QPC is {target}.")
            continue
        try:
            if before is None:
                link.symlink_to(target.name)
            elif before.name != target.name:
                _replace(link, target.name)
                moved.setdefault(before.name, []).append(name)
        except OSError as error:
            said.append(f"{link} cannot be made a link to {target} ({error.strerror}).")
    for was, names in moved.items():
        lead = "lead" if len(names) > 1 else "leads"
        said.append(f"{' and '.join(names)} now {lead} to {target.name}, not to {was} any more.")
    return said


def led_to(path: Path) -> Path | None:
    """The variant's folder that one of our links leads to, whether it is there or was removed.

    None for anything that is not such a link.
    """
    try:
        name = os.readlink(path)
    except OSError:
        return None
    folder = path.parent / name
    if not _OUR_NAME.fullmatch(name):
        return None
    return folder if (folder / VARIANT_FILE).is_file() or not os.path.lexists(folder) else None


def _replace(link: Path, name: str) -> None:
    """Have a link lead to another name, so that there is always one of the two."""
    fresh = link.with_name(f".{link.name}.{secrets.token_hex(4)}.unfinished")
    try:
        fresh.symlink_to(name)
        os.replace(fresh, link)
    finally:
        with suppress(FileNotFoundError):
            fresh.unlink()
