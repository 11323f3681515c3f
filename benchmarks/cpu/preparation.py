"""What is made once and found again: environments of the peers, a Q8_0 file, programs of ours.

Nothing is installed into the environment that runs the benchmark.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from qaic_ray.files.folders import locked, replacing, sha256_of
from qaic_ray.model.checkpoint import Checkpoint

LLAMA_CPP = ("xllamacpp",)
OPENVINO = ("openvino", "optimum-intel")
FORMAT = 1
_MADE = "made.json"
_TESTS = Path(__file__).resolve().parents[2] / "tests"


class PeerMissing(Exception):
    """A peer cannot be set up here; one sentence."""


# -- environments


def peer_python(
    folder: Path,
    packages: tuple[str, ...],
    *,
    sees_ours: bool = False,
    base: str = sys.executable,
    with_dependencies: bool = True,
) -> Path:
    """The Python of an environment with these packages, made where it is not there.

    Args:
        folder: of the environment.
        packages: to install.
        sees_ours: whether it uses the torch and transformers of this environment where its
            packages have no other wish. Torch is never installed.
        base: the Python that it is made of.
        with_dependencies: whether what the packages need is installed too.

    Raises:
        PeerMissing: it could not be made.
    """
    python = folder / "bin" / "python"
    wanted = {"format": FORMAT, "packages": list(packages), "sees": sys.prefix if sees_ours else ""}
    with locked(folder):
        if (folder / _MADE).is_file() and _read(folder / _MADE) == wanted:
            return python
        if folder.exists():
            shutil.rmtree(folder)
        _run([base, "-m", "venv", str(folder)])
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if sees_ours:
            _show_ours(folder)
            pinned = folder / "constraints.txt"
            pinned.write_text(f"torch=={_torch_version()}\n")
            install += ["--constraint", str(pinned)]
        if not with_dependencies:
            install.append("--no-deps")
        _run([*install, *packages])
        if sees_ours:
            # A torchvision of another build of torch keeps transformers from being imported.
            _run([*install[:3], "uninstall", "--quiet", "--yes", "torchvision"])
        (folder / _MADE).write_text(json.dumps(wanted))
    return python


def _torch_version() -> str:
    try:
        return metadata.version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        raise PeerMissing("torch is not installed: pip install 'qaic-ray[export]'") from None


def _show_ours(folder: Path) -> None:
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (Path(purelib) / "running_environment.pth").write_text("".join(f"{path}\n" for path in ours))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = next(
            (line for line in lines if line.startswith("ERROR")), (lines or ["nothing"])[-1]
        )
        raise PeerMissing(f"{' '.join(command[:4])} ... failed: {said[:300]}")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def versions(python: Path | str, packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of packages in an environment."""
    code = "import json,sys;from importlib.metadata import version as v;"
    code += "print(json.dumps({name: v(name) for name in sys.argv[1:]}))"
    done = subprocess.run(
        [str(python), "-c", code, *packages], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


# -- llama.cpp's file


def q8_0_file(folder: Path, checkpoint: Checkpoint) -> Path:
    """The checkpoint as a GGUF file with every matrix as Q8_0, made where it is not there.

    Raises:
        PeerMissing: gguf or torch is not there, or the model is none that is written here.
    """
    weights = sha256_of(checkpoint.weight_files[0])[:16]
    path = folder / f"{checkpoint.base}-{weights}-q8_0-{FORMAT}.gguf"
    with locked(path):
        if not path.is_file():
            unfinished = path.with_suffix(".unfinished")
            with replacing(path, unfinished):
                _write_q8_0(unfinished, checkpoint)
    return path


def _write_q8_0(path: Path, checkpoint: Checkpoint) -> None:
    try:
        import gguf
        import transformers

        sys.path.append(str(_TESTS))
        from gguf_models import GgufModel
    except ImportError as error:
        raise PeerMissing(f"{error}; `make install` brings it") from None
    finally:
        if sys.path[-1] == str(_TESTS):
            sys.path.pop()
    if checkpoint.config["model_type"] != "llama":
        raise PeerMissing(
            f"Q8_0 is written of llama models, not of {checkpoint.config['model_type']}"
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="float32")
    written = GgufModel.of(model, "llama")
    written.keys |= vocabulary_keys(_read(checkpoint.folder / "tokenizer.json"))
    written.keys["tokenizer.ggml.eos_token_id"] = checkpoint.eos_ids[0]
    written.keys["tokenizer.ggml.bos_token_id"] = checkpoint.config["bos_token_id"]
    written.quantize(gguf.GGMLQuantizationType.Q8_0, lambda name: True)
    written.write(path)


def vocabulary_keys(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE as the keys of a GGUF file.

    Raises:
        PeerMissing: it is of another kind.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise PeerMissing(f"the tokenizer is {model.get('type')}, and only BPE is written")
    ids = dict(model["vocab"])
    special = {}
    for added in tokenizer.get("added_tokens", []):
        ids[added["content"]] = added["id"]
        special[added["id"]] = 3 if added["special"] else 4
    words = sorted(ids, key=lambda word: int(ids[word]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [special.get(ids[word], 1) for word in words],
        "tokenizer.ggml.merges": merges,
    }


# -- ours


def program(sdk: Any, model: str, shape: dict[str, Any]) -> Path:
    """The QPC of a shape, made as `qaic-ray run MODEL` makes it and kept in the same cache."""
    from qaic_ray.api.quiet import LogListener
    from qaic_ray.options import ModelOptions, VariantChoice
    from qaic_ray.pipeline.prepare_step import prepare

    return prepare(ModelOptions(name=model), VariantChoice(**shape), sdk, LogListener())
