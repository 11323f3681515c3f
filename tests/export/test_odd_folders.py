"""Folders that hold things twice, by odd names, or are something else: what transformers does, or
one sentence, whether the export is verified or not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from byte_tokens import with_byte_tokenizer
from random_models import export_untouched
from safetensors.torch import load_file, save_file

from qaic_ray.errors import CheckpointError
from qaic_ray.model.checkpoint import Checkpoint, open_checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | changes))


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    kept = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, path, metadata={"format": "pt"})


def change(folder: Path, alter: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    alter(tensors)
    save(tensors, folder / SINGLE)


def shard(folder: Path, *, into: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> None:
    """Two files and their index in place of one."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    halves = names[::2], names[1::2]
    for file, half in zip(into, halves, strict=True):
        save({name: tensors[name] for name in half}, folder / file)
    weight_map = {n: file for file, half in zip(into, halves, strict=True) for n in half}
    edit(folder, INDEX, metadata={}, weight_map=weight_map)
    (folder / SINGLE).unlink()


def other_head(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)


def same_head(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))


def no_head(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    change(folder, lambda t: t.pop("lm_head.weight") is None)


def single_beside_shards(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    change(folder, lambda t: t.update({name: tensor + 1 for name, tensor in t.items()}))
    shard(folder)
    (folder / SINGLE).write_bytes(data)


def index_that_lies(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    edit(folder, INDEX, weight_map={name: other[file] for name, file in index.items()})


def files_that_no_index_names(folder: Path) -> None:
    shard(folder)
    for name in ("consolidated.safetensors", "model-00003-of-00002.safetensors"):
        save({"model.norm.weight": torch.zeros(32)}, folder / name)


def chosen_file(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "mine.safetensors")
    edit(folder, transformers_weights="mine.safetensors")
    save({"model.norm.weight": torch.zeros(32)}, folder / SINGLE)


def chosen_index(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    shard(folder)
    (folder / INDEX).rename(folder / "mine.safetensors.index.json")
    edit(folder, transformers_weights="mine.safetensors.index.json")
    (folder / SINGLE).write_bytes(data)


def both_ropes(folder: Path) -> None:
    edit(folder, rope_theta=500.0, rope_scaling=LLAMA3)


def context_outside(folder: Path) -> None:
    edit(folder, rope_scaling=LLAMA3, original_max_position_embeddings=32)


def half_precision(folder: Path) -> None:
    change(folder, lambda t: t.update({name: x.bfloat16() for name, x in t.items()}))


def old_tables(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda t: t.update({name: torch.ones(4)}))


AS_TRANSFORMERS = [
    other_head, same_head, no_head, single_beside_shards, index_that_lies,
    files_that_no_index_names, chosen_file, chosen_index, both_ropes, context_outside,
    half_precision, old_tables,
]  # fmt: skip


@pytest.mark.parametrize("alter", AS_TRANSFORMERS, ids=lambda alter: alter.__name__)
def test_read_as_transformers_reads_it(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, alter: Callable[[Path], None]
) -> None:
    """The verification loads the same folder with transformers."""
    folder = make_checkpoint().folder
    alter(folder)
    result = export_untouched(open_checkpoint(str(folder)), output=tmp_path / "kv", verify="full")
    assert result.verification is not None
    assert max(scenario.logits for scenario in result.verification.scenarios) < 1e-4


def test_the_head_that_is_there_is_the_one_of_transformers(
    make_checkpoint: Callable[..., Checkpoint],
) -> None:
    folder = make_checkpoint().folder
    other_head(folder)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, load_file(folder / SINGLE)["lm_head.weight"])
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)


def odd_name(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.safetensors")


def only_the_makers_own(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "consolidated.safetensors")


def an_adapter(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    edit(folder, "adapter_config.json", peft_type="LORA")


def an_adapter_beside(folder: Path) -> None:
    edit(folder, "adapter_config.json", peft_type="LORA")


def tensors_of_an_adapter(folder: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change(folder, lambda t: t.update({name: torch.ones(2, 32)}))


def model_optimizer(folder: Path) -> None:
    edit(folder, "hf_quant_config.json", quantization={"quant_algo": "FP8"})


def quantized(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "awq"})


def quantized_by_nobody(folder: Path) -> None:
    edit(folder, quantization_config={})


def quantized_in_a_word(folder: Path) -> None:
    edit(folder, quantization_config="x")


def packed(folder: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.qweight"] = torch.ones(4, 4, dtype=torch.int32)

    change(folder, pack)


def fp8(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))


def fp8_scale(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    change(folder, lambda t: t.update({name: torch.ones(1, 1)}))


def pipeline(folder: Path) -> None:
    (folder / "config.json").rename(folder / "model_index.json")


def gguf_beside(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "m.Q4_K_M.gguf").touch()


def nothing(folder: Path) -> None:
    (folder / "config.json").unlink()


def pointer(folder: Path) -> None:
    (folder / SINGLE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def twice(folder: Path) -> None:
    shard(folder)
    tensors = load_file(folder / "a.safetensors")
    name = sorted(tensors)[0]
    save(load_file(folder / "b.safetensors") | {name: tensors[name]}, folder / "b.safetensors")


def prefix(new: str) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        save(
            {name.replace("model.", new, 1): tensor for name, tensor in tensors.items()},
            folder / SINGLE,
        )

    alter.__name__ = f"prefix {new}"
    return alter


def more_layers(folder: Path) -> None:
    edit(folder, num_hidden_layers=4)


def layers_without_end(folder: Path) -> None:
    edit(folder, num_hidden_layers=2**31 - 1)


def fewer_layers(folder: Path) -> None:
    edit(folder, num_hidden_layers=2)


def other_vocabulary(folder: Path) -> None:
    edit(folder, vocab_size=301)


def huge(folder: Path) -> None:
    edit(folder, hidden_size=2**31 - 4, head_dim=8)


def two_kinds(folder: Path) -> None:
    edit(folder, model_type="qwen2")


def no_head_untied(folder: Path) -> None:
    change(folder, lambda t: t.pop("lm_head.weight") is None)


def chosen_outside(folder: Path) -> None:
    edit(folder, transformers_weights="../x.safetensors")


def header(changes: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        fields = json.loads(data[8:end])
        text = json.dumps(changes(fields) or fields).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    alter.__name__ = "header"
    return alter


NORM = "model.norm.weight"


def at_the_same_place(fields: dict[str, Any]) -> None:
    others = [name for name in fields if "norm.weight" in name and name != NORM]
    fields[NORM]["data_offsets"] = fields[others[0]]["data_offsets"]


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (odd_name, r"no model\.safetensors, but pytorch_model\.safetensors: rename it"),
    (only_the_makers_own, r"but consolidated\.safetensors"),
    (an_adapter, "PEFT adapter .* merge it"),
    (an_adapter_beside, "PEFT adapter .* merge it"),
    (tensors_of_an_adapter, r"lora_A\.weight .*merge it"),
    (model_optimizer, r"hf_quant_config\.json"),
    (quantized, "quantized with awq"),
    (quantized_by_nobody, "quantized with unknown"),
    (quantized_in_a_word, "quantization_config in config.json .* is 'x'"),
    (packed, r"no tensor .*q_proj\.weight, but .*q_proj\.qweight: its weights are quantized"),
    (fp8, "has the type F8_E4M3"),
    (fp8_scale, r"weight_scale_inv .*quantized"),
    (pipeline, "diffusers"),
    (gguf_beside, r"give the file, .*m\.Q4_K_M\.gguf"),
    (nothing, r"no config\.json"),
    (pointer, "git lfs pull"),
    (twice, "again in b.safetensors"),
    (prefix(""), r"no tensor model\.embed_tokens\.weight"),
    (prefix("language_model.model."), r"no tensor model\.embed_tokens\.weight"),
    (more_layers, r"no tensor model\.layers\.3"),
    (layers_without_end, "num_hidden_layers .* is 2147483647"),
    (fewer_layers, r"tensor model\.layers\.2.* does not account for"),
    (other_vocabulary, r"has the shape \[300, 32\]; config\.json says \[301, 32\]"),
    (huge, r"has the shape \[300, 32\]; config\.json says \[300, 2147483644\]"),
    (two_kinds, "model_type in config.json .* is 'qwen2'; it must be llama"),
    (no_head_untied, r"no tensor lm_head\.weight"),
    (chosen_outside, "which is not a file of that folder"),
    (header(at_the_same_place), "a place that is not behind the tensor before"),
    (header(lambda f: f.update({NORM: 5})), "malformed at 'model.norm.weight', which is 5"),
    (header(lambda f: f[NORM].update(shape=[32.0])), "malformed at"),
    (header(lambda f: f[NORM].update(shape=[-32])), "malformed at"),
    (header(lambda f: f[NORM].update(shape=[10**30])), "impossible place"),
    (header(lambda f: f[NORM].update(data_offsets=[1])), "malformed at"),
    (header(lambda f: f[NORM].update(data_offsets=None)), "malformed at"),
    (header(lambda f: [f]), "must hold a JSON object"),
]


@pytest.mark.parametrize("verify", ["off", "full"])
@pytest.mark.parametrize(("alter", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_named_in_one_sentence(
    make_checkpoint: Callable[..., Checkpoint],
    tmp_path: Path,
    alter: Callable[[Path], None],
    message: str,
    verify: str,
) -> None:
    folder, out = make_checkpoint().folder, tmp_path / "out"
    out.mkdir()
    alter(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        export_untouched(open_checkpoint(str(folder)), output=out / "kv", verify=verify)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert os.listdir(out) == []


def test_a_tokenizer_of_another_model_is_named(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(vocab_size=100)
    folder = with_byte_tokenizer(checkpoint, tmp_path / "with")
    with pytest.raises(CheckpointError, match=r"gives the token \d+, and vocab_size .* is 100"):
        export_untouched(open_checkpoint(str(folder)), output=tmp_path / "kv", verify="full")


def test_what_only_transformers_cannot_load_is_a_sentence_too(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    folder = make_checkpoint().folder
    edit(folder, initializer_range="x")  # nothing that an export reads
    checkpoint = open_checkpoint(str(folder))
    export_untouched(checkpoint, output=tmp_path / "off", verify="off")
    with pytest.raises(CheckpointError, match=r"transformers.* cannot load .*initializer_range"):
        export_untouched(checkpoint, output=tmp_path / "full", verify="full")
