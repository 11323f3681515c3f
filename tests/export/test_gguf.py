"""GGUF files against llama.cpp on the same file, and against the gguf package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_models import VOCAB, GgufModel, Quantization, opened, random_model
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import LlamaCpp
from random_models import export_untouched
from safetensors.numpy import load_file

from qaic_ray.errors import CheckpointError
from qaic_ray.export.check.replay import open_replay
from qaic_ray.model import gguf_conversion
from qaic_ray.model.checkpoint import Checkpoint
from qaic_ray.options import ExportOptions

PROMPTS = [[257, 5, 6, 7], [257, *((37 * i) % 250 for i in range(60))]]
CTX_LEN = 64
TOLERANCE = 1e-3
DIVISORS = {"rope_freqs.weight": np.array([1, 1, 1.5, 3, 6, 8, 8, 8], np.float32)}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
GRANITE = {
    "embedding_scale": 3.0,
    "residual_scale": 0.4,
    "attention.scale": 0.2,
    "logit_scale": 2.0,
}


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    with LlamaCpp() as running:
        yield running


def llama(**changes: Any) -> GgufModel:
    return GgufModel.of(random_model("Llama", **changes), "llama")


def with_keys(model: GgufModel, **keys: Any) -> GgufModel:
    model.keys |= {f"{model.arch}.{key}": value for key, value in keys.items()}
    return model


def with_tensors(model: GgufModel, tensors: dict[str, Any]) -> GgufModel:
    model.tensors |= tensors
    return model


def without(model: GgufModel, *ends: str) -> GgufModel:
    for held in (model.keys, model.tensors):
        for name in [name for name in held if name.endswith(ends)]:
            del held[name]
    return model


MODELS: dict[str, Callable[[], GgufModel]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, own head_dim": lambda: llama(head_dim=32),
    "llama, every head its own": lambda: without(llama(num_key_value_heads=4), "head_count_kv"),
    "llama, fewest keys": lambda: without(
        llama(), "key_length", "value_length", "dimension_count", "freq_base", "llama.vocab_size"
    ),
    "llama, arrays over layers": lambda: with_keys(
        llama(),
        **{"feed_forward_length": [96, 96], "attention.head_count_kv": [2, 2]},
    ),
    "llama, biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama, biases of q, k, v": lambda: without(llama(attention_bias=True), "attn_output.bias"),
    "llama, base": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama, linear": lambda: with_keys(llama(), **LINEAR),
    "llama, factor alone": lambda: with_keys(llama(), **{"rope.scaling.factor": 4.0}),
    "llama, older factor": lambda: with_keys(llama(), **{"rope.scale_linear": 4.0}),
    "llama, no scaling": lambda: with_keys(llama(), **LINEAR | {"rope.scaling.type": "none"}),
    "llama, yarn": lambda: with_keys(llama(), **YARN),
    "llama, divisors": lambda: with_tensors(llama(), DIVISORS),
    "llama, divisors and linear": lambda: with_tensors(with_keys(llama(), **LINEAR), DIVISORS),
    "mistral": lambda: GgufModel.of(
        random_model("Mistral", head_dim=24, sliding_window=None), "llama"
    ),
    "qwen2": lambda: GgufModel.of(random_model("Qwen2"), "qwen2"),
    "qwen2, tied": lambda: GgufModel.of(random_model("Qwen2", tie_word_embeddings=True), "qwen2"),
    "qwen2, yarn": lambda: GgufModel.of(random_model("Qwen2"), "qwen2", YARN),
    "qwen3": lambda: GgufModel.of(random_model("Qwen3", head_dim=32), "qwen3"),
    "granite": lambda: GgufModel.of(random_model("Granite"), "granite", GRANITE),
    "granite, one scale": lambda: GgufModel.of(
        random_model("Granite"), "granite", {"logit_scale": 2.0}
    ),
}


def export_logits(checkpoint: Checkpoint, out: Path) -> list[Any]:
    """[vocab]: what the exported graph says follows each of `PROMPTS`."""
    result = export_untouched(
        checkpoint,
        ExportOptions(logits="all", continuous_batching=False),
        output=out / "kv",
        verify="off",
    )
    layers = range(result.manifest.num_layers)
    replay = open_replay(result.folder, result.manifest, layers, CTX_LEN)
    found = []
    for prompt in PROMPTS:
        replay.reset(1)
        answers = replay.prefill([np.array(prompt)], [0], len(prompt))
        found.append(answers[-1].values.astype(np.float64))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_llama_cpp(
    llama_cpp: LlamaCpp, tmp_path: Path, name: str
) -> None:
    path = MODELS[name]().write(tmp_path / "model.gguf")
    llama_cpp.open(path)
    checkpoint = opened(path, tmp_path)
    for prompt, logits in zip(PROMPTS, export_logits(checkpoint, tmp_path), strict=True):
        expected = llama_cpp.log_probs(prompt)
        log_probs = logits - np.logaddexp.reduce(logits)
        assert len(expected) == VOCAB
        assert np.abs(log_probs - expected).max() < TOLERANCE


def test_export_of_a_gguf_file_is_verified(tmp_path: Path) -> None:
    """The folder means to transformers what it means to us, divisors of the rope too."""
    path = with_tensors(llama(), DIVISORS).write(tmp_path / "model.gguf")
    checkpoint = opened(path, tmp_path)
    result = export_untouched(checkpoint, output=tmp_path / "kv", verify="full")
    assert result.verification is not None
    assert max(scenario.logits for scenario in result.verification.scenarios) < 1e-4


@pytest.mark.parametrize("given", range(3))
def test_parts_are_joined_from_whichever_is_given(
    llama_cpp: LlamaCpp, tmp_path: Path, given: int
) -> None:
    model = llama()
    whole = model.write(tmp_path / "whole.gguf")
    paths = model.write_split(tmp_path, "tiny", 3)
    checkpoint = opened(paths[given], tmp_path)
    assert checkpoint.base == "tiny"
    (weights,) = checkpoint.weight_files
    (expected,) = opened(whole, tmp_path).weight_files
    assert weights.read_bytes() == expected.read_bytes()
    llama_cpp.open(paths[0])
    logits = export_logits(checkpoint, tmp_path)[1]
    log_probs = logits - np.logaddexp.reduce(logits)
    assert np.abs(log_probs - llama_cpp.log_probs(PROMPTS[1])).max() < TOLERANCE


def test_a_conversion_is_found_by_the_content_of_all_parts(tmp_path: Path) -> None:
    model = llama()
    paths = model.write_split(tmp_path, "tiny", 2)
    first = opened(paths[0], tmp_path).folder
    assert opened(paths[1], tmp_path).folder == first
    model.tensors["output.weight"] = model.tensors["output.weight"] + 1
    model.write_split(tmp_path, "tiny", 2)
    assert opened(paths[0], tmp_path).folder != first


def lose_a_part(folder: Path) -> None:
    (folder / "tiny-00002-of-00003.gguf").unlink()


def swap_parts(folder: Path) -> None:
    first, second = (folder / f"tiny-0000{n}-of-00003.gguf" for n in (2, 3))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def take_a_part_of_less(folder: Path) -> None:
    model = llama()
    model.tensors.popitem()
    model.write_split(folder, "tiny", 3)[2].rename(folder / "kept")
    llama().write_split(folder, "tiny", 3)
    (folder / "kept").rename(folder / "tiny-00003-of-00003.gguf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_part, r"tiny-00002-of-00003\.gguf is missing"),
        (swap_parts, r"says that it is part 2 \(split\.no, from 0\) of 3 .*its name says 1 of 3"),
        (take_a_part_of_less, r"again in|\(split\.tensors\.count\)"),
    ],
)
def test_parts_that_do_not_belong_together(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    paths = llama().write_split(tmp_path, "tiny", 3)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        opened(paths[0], tmp_path)


WRITABLE = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize("kind", WRITABLE)
def test_quantized_values_are_those_of_the_gguf_package(tmp_path: Path, kind: str) -> None:
    model = llama(intermediate_size=128)
    model.quantize(Quantization[kind], lambda name: True)
    check_bits(model, tmp_path)


BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "TQ1_0", "IQ2_XXS", "IQ3_S")


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_any_type_are_read_as_the_gguf_package_reads_them(
    tmp_path: Path, kind: str
) -> None:
    """Types that it cannot write: bytes at random, in matrices as wide as a block."""
    model = llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=64)
    random = np.random.default_rng(0)
    for name in ("blk.0.ffn_down.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        shape = gguf.quant_shape_to_byte_shape(model.tensors[name].shape, Quantization[kind])
        # Halves of the scales stay finite: no byte has all the bits of an infinity.
        model.tensors[name] = random.integers(0, 120, shape, np.uint8)
        model.types[name] = Quantization[kind]
    check_bits(model, tmp_path)


def check_bits(model: GgufModel, tmp_path: Path) -> None:
    path = model.write(tmp_path / "model.gguf")
    (weights,) = opened(path, tmp_path).weight_files
    found = load_file(weights)
    names = {
        "ffn_down": "mlp.down_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q": "self_attn.q_proj",
    }
    for tensor in gguf.GGUFReader(path).tensors:
        stem = tensor.name.removeprefix("blk.0.").removesuffix(".weight")
        if stem not in names or not tensor.name.startswith("blk.0."):
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if stem == "attn_q":
            # Written from halves of a head to pairs of neighbours; read back again.
            values = values.reshape(4, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        ours = found[f"model.layers.0.{names[stem]}.weight"]
        assert ours.tobytes() == values.tobytes()


REFUSED: dict[str, tuple[Callable[[], GgufModel], str]] = {
    "another architecture": (
        lambda: GgufModel("phi3", {"phi3.block_count": 2}, {"x": np.zeros(4, np.float32)}),
        "of the architecture 'phi3'",
    ),
    "a part of a head": (
        lambda: with_keys(llama(), **{"rope.dimension_count": 8}),
        r"llama\.rope\.dimension_count of model\.gguf is 8; it must be as large as a head, 16",
    ),
    "experts": (lambda: with_keys(llama(), expert_count=8), "llama.expert_count = 8"),
    "tensors of experts": (
        lambda: with_tensors(llama(), {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4), np.float32)}),
        r"blk\.0\.ffn_gate_exps\.weight",
    ),
    "a tensor too many": (
        lambda: with_tensors(llama(), {"blk.2.attn_norm.weight": np.zeros(64, np.float32)}),
        r"blk\.2\.attn_norm\.weight.* of 2 layers does not have",
    ),
    "a tensor too few": (
        lambda: without(llama(), "blk.1.ffn_up.weight"),
        r"no tensor blk\.1\.ffn_up\.weight",
    ),
    "a norm of q under llama": (
        lambda: with_tensors(llama(), {"blk.0.attn_q_norm.weight": np.zeros(16, np.float32)}),
        "attn_q_norm",
    ),
    "layers of other sizes": (
        lambda: with_keys(llama(), feed_forward_length=[96, 48]),
        r"feed_forward_length of model\.gguf is \[96, 48\]",
    ),
    "soft caps": (
        lambda: with_keys(llama(), final_logit_softcapping=30.0),
        "final_logit_softcapping = 30",
    ),
    "granite's scale elsewhere": (
        lambda: with_keys(llama(), **{"attention.scale": 0.2}),
        r"attention\.scale = 0\.2",
    ),
    "granite without rotary": (
        lambda: GgufModel.of(random_model("Granite"), "granite", {"rope.scaling.finetuned": False}),
        r"finetuned.*without rotary",
    ),
    "longrope": (
        lambda: with_keys(llama(), **YARN | {"rope.scaling.type": "longrope"}),
        r"rope\.scaling\.type .*'longrope'",
    ),
    "yarn of its own numbers": (
        lambda: with_keys(llama(), **YARN | {"rope.scaling.yarn_beta_fast": 8.0}),
        r"yarn_beta_fast of model\.gguf is 8\.0",
    ),
    "yarn beside divisors": (
        lambda: with_tensors(with_keys(llama(), **YARN), DIVISORS),
        "beside the tensor rope_freqs",
    ),
    "divisors of another length": (
        lambda: with_tensors(llama(), {"rope_freqs.weight": np.ones(4, np.float32)}),
        "must hold 8 divisors",
    ),
    "a divisor of nothing": (
        lambda: with_tensors(llama(), {"rope_freqs.weight": np.zeros(8, np.float32)}),
        "divisors above 0",
    ),
    "a key nobody knows": (lambda: with_keys(llama(), **{"new.thing": 1}), "llama.new.thing = 1"),
    "eps": (
        lambda: with_keys(llama(), **{"attention.layer_norm_rms_epsilon": float("nan")}),
        r"layer_norm_rms_epsilon of model\.gguf is nan",
    ),
    "base": (
        lambda: with_keys(llama(), **{"rope.freq_base": 0.0}),
        r"rope\.freq_base of model\.gguf is 0\.0",
    ),
    "no layers": (lambda: without(llama(), "block_count"), "block_count of model.gguf is missing"),
    "layers without end": (
        lambda: with_keys(llama(), block_count=2**31 - 2),
        "has 2147483646 layers|2147483646 layers; it has",
    ),
    "rows that are no tokens": (
        lambda: with_keys(llama(), vocab_size=299),
        "vocab_size of model.gguf is 299; it must be 300",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_run_is_named(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    path = make().write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(path, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list((tmp_path / "models").iterdir()) == []


def test_a_window_makes_the_context_shorter(tmp_path: Path) -> None:
    model = with_keys(llama(), **{"attention.sliding_window": 32})
    path = model.write(tmp_path / "model.gguf")
    checkpoint = opened(path, tmp_path)
    assert checkpoint.config["max_position_embeddings"] == 32


def test_all_ids_that_end_a_turn_are_known(tmp_path: Path) -> None:
    model = llama()
    model.keys |= {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 10}
    path = model.write(tmp_path / "model.gguf")
    checkpoint = opened(path, tmp_path)
    assert checkpoint.eos_ids == (258, 9, 10, 259)
    config = json.loads((checkpoint.folder / "config.json").read_text())
    assert config["eos_token_id"] == [258, 9, 10, 259]


def test_a_file_that_changes_meanwhile_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama().write(tmp_path / "model.gguf")
    read = gguf_conversion.read_gguf

    def change_and_read(path: Path) -> Any:
        llama(tie_word_embeddings=True).write(path)
        return read(path)

    monkeypatch.setattr(gguf_conversion, "read_gguf", change_and_read)
    with pytest.raises(CheckpointError, match="changed while it was converted"):
        opened(path, tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


ODD = st.sampled_from(
    [0, 1, 2**31, -1, 0.0, 1.5, float("nan"), float("inf"), "", "x", True, False, [1], ["x"], [0.5]]
)


@given(data=st.data())
def test_any_key_is_read_or_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    model = llama(num_hidden_layers=1)
    more = ["llama.rope.scaling.type", "llama.rope.scaling.factor", "tokenizer.chat_template"]
    more += [f"tokenizer.ggml.{key}" for key in ("add_bos_token", "eot_token_id", "scores")]
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from([*model.keys, *more]))
        model.keys[key] = data.draw(ODD)
    if data.draw(st.booleans()):
        model.keys["tokenizer.ggml.model"] = "llama"
    path = model.write(tmp_path / "model.gguf")
    said = ""
    try:
        opened(path, tmp_path)
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500
