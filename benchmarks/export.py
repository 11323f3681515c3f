"""How long an export takes and how much memory it needs, against the size of its checkpoint.

    python benchmarks/export.py [--folder SCRATCH] [PART ...]

Parts: `smollm2` (the known model, to a finished folder), `7b` (a random sharded bfloat16 checkpoint
of 13 GB, made in the scratch folder and removed, against `cp` of the same bytes), `70b` (the graph
of 80 layers, no weights), `70b-reference` (a whole export of 80 layers that points at 141 GB of
weights, a hole in sparse files, and leaves them there). Prints a table, and one JSON object as its
last line. Peers (optimum, QEfficient) need packages that this project does not, so they are left
out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from qaic_ray.files.folders import sync_tree

STATIC = '{"continuous_batching": false}'
EXPORT = """
import json, sys
from pathlib import Path
from qaic_ray.export.export import export_model
from qaic_ray.options import ExportOptions
from qaic_ray.model.checkpoint import open_checkpoint
model, output, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
export_model(open_checkpoint(model), ExportOptions(**options), output=output, verify="off")
"""
GRAPH = """
import json, sys
from pathlib import Path
import onnx
from qaic_ray.export.architecture import read_architecture
from qaic_ray.export.graph import author
from qaic_ray.export.graph import simplifying
from qaic_ray.options import ExportOptions
graph = author(read_architecture(json.loads(sys.argv[1])), ExportOptions(continuous_batching=True))
with simplifying(graph.model, Path(sys.argv[2])) as simplified:
    onnx.save(simplified(), Path(sys.argv[2]) / "graph.onnx")
"""

SHAPE_7B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}
SHAPE_70B = SHAPE_7B | {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LIMITS = {
    "smollm2_wall_s": ("at most", 8.0),
    "smollm2_peak_tree_mb": ("at most", 700.0),
    "7b_peak_tree_mb": ("at most", 1500.0),
    "7b_speed_of_cp": ("at least", 0.5),
    "70b_graph_wall_s": ("at most", 10.0),
    "70b_reference_wall_s": ("at most", 20.0),
    "70b_reference_peak_tree_mb": ("at most", 400.0),
    "70b_reference_graph_mb": ("at most", 10.0),
}
SAMPLE_S = 0.02

_SHARD_BYTES = 4 << 30


def measure(program: str, *arguments: str) -> tuple[float, float, float]:
    """Wall seconds of a Python program, and peak MB of its process and of its whole tree.

    Memory is what is resident, shared pages counted once for every process.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program, *arguments])
    watched, main, tree = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        sizes = []
        for member in (watched, *_children(watched)):
            try:
                sizes.append(member.memory_info().rss)
            except psutil.Error:
                sizes.append(0)  # ended since it was listed
        main, tree = max(main, sizes[0]), max(tree, sum(sizes))
        time.sleep(SAMPLE_S)
    if process.returncode != 0:
        raise SystemExit(f"the export ended with exit code {process.returncode}")
    return time.perf_counter() - start, main / 1e6, tree / 1e6


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def smollm2(folder: Path) -> dict[str, float]:
    """The known model in its default form; it is fetched first where it is not in the cache."""
    from qaic_ray.model.checkpoint import open_checkpoint

    open_checkpoint("smollm2-135m")
    wall, main, tree = measure(EXPORT, "smollm2-135m", str(folder / "smollm2-kv"), STATIC)
    return {
        "smollm2_wall_s": wall,
        "smollm2_peak_main_mb": main,
        "smollm2_peak_tree_mb": tree,
    }


def seven_billion(folder: Path) -> dict[str, float]:
    """13 GB of bfloat16 to float16, as many bytes as `cp` copies."""
    checkpoint, copy = folder / "random-7b", folder / "copy"
    need = 2 * write_checkpoint(checkpoint, SHAPE_7B)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise SystemExit(f"{folder} has {free / 1e9:.0f} GB free and {need / 1e9:.0f} are needed")
    forget_pages(checkpoint)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(checkpoint), str(copy)], check=True)
    sync_tree(copy)
    copied = time.perf_counter() - start
    shutil.rmtree(copy)
    forget_pages(checkpoint)
    output = folder / "random-7b-kv"
    wall, main, tree = measure(
        EXPORT, str(checkpoint), str(output), '{"continuous_batching": false, "dtype": "float16"}'
    )
    return {
        "7b_wall_s": wall,
        "7b_cp_s": copied,
        "7b_speed_of_cp": copied / wall,
        "7b_peak_main_mb": main,
        "7b_peak_tree_mb": tree,
    }


def forget_pages(folder: Path) -> None:
    """So that who comes first does not read from memory what the other has to read from disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seventy_billion(folder: Path) -> dict[str, float]:
    """The simplified graph of 80 layers, with imports."""
    scratch = folder / "70b"
    scratch.mkdir()
    wall, _, tree = measure(GRAPH, json.dumps(SHAPE_70B), str(scratch))
    return {"70b_graph_wall_s": wall, "70b_graph_peak_tree_mb": tree}


def seventy_billion_in_place(folder: Path) -> dict[str, float]:
    """A model folder of 80 layers and 131,072 positions whose weights stay in the checkpoint."""
    checkpoint, output = folder / "sparse-70b", folder / "sparse-70b-kv"
    weights = write_checkpoint(
        checkpoint, SHAPE_70B | {"max_position_embeddings": 131_072}, sparse=True
    )
    wall, main, tree = measure(EXPORT, str(checkpoint), str(output), '{"weights": "reference"}')
    sizes = {path.suffix: path.stat().st_size for path in output.rglob("*.onnx*")}
    return {
        "70b_reference_wall_s": wall,
        "70b_reference_peak_main_mb": main,
        "70b_reference_peak_tree_mb": tree,
        "70b_reference_weights_gb": weights / 1e9,
        "70b_reference_graph_mb": sizes[".onnx"] / 1e6,
        "70b_reference_tables_mb": sizes[".data"] / 1e6,
    }


def write_checkpoint(folder: Path, config: dict[str, Any], *, sparse: bool = False) -> int:
    """A random sharded bfloat16 checkpoint, or one of zeros that take no disk; its bytes.

    The same noise comes again every few tensors: what is in them makes no difference to a stream.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << (0 if sparse else 26), np.float32) * 0.02).view(np.uint32)
    pool = (noise >> 16).astype(np.uint16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in _tensors(config):
        num_bytes = int(np.prod(shape)) * 2
        if size + num_bytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    weight_map, total = {}, 0
    for number, shard in enumerate(shards):
        name = f"model-{number:05d}.safetensors"
        total += _write_shard(folder / name, shard, None if sparse else pool)
        weight_map |= dict.fromkeys(shard, name)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _tensors(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    shared = hidden // heads * config.get("num_key_value_heads", heads)
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        **{f"self_attn.{which}_proj": (hidden, hidden) for which in "qo"},
        **{f"self_attn.{which}_proj": (shared, hidden) for which in "kv"},
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = [("model.embed_tokens.weight", (config["vocab_size"], hidden))]
    for layer in range(config["num_hidden_layers"]):
        tensors += [(f"model.layers.{layer}.{k}.weight", v) for k, v in shapes.items()]
    tensors += [("model.norm.weight", (hidden,))]
    return [*tensors, ("lm_head.weight", (config["vocab_size"], hidden))]


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], pool: Any) -> int:
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = 0 if pool is None else offset // 2
        if pool is None:
            file.truncate(8 + len(text) + offset)
        while left:
            file.write(pool[:left].data)
            left -= min(left, pool.size)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + offset


PARTS = {
    "smollm2": smollm2,
    "7b": seven_billion,
    "70b": seventy_billion,
    "70b-reference": seventy_billion_in_place,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--folder", type=Path, help="where 27 GB may be written and removed")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    figures: dict[str, float] = {}
    for part in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            figures |= PARTS[part](Path(scratch))
    for name, value in figures.items():
        word, limit = LIMITS.get(name, ("", 0.0))
        holds = value <= limit if word == "at most" else value >= limit
        verdict = f"{word} {limit:g}: {'holds' if holds else 'MISSED'}" if word else ""
        print(f"{name:26} {value:10.2f}   {verdict}")
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
