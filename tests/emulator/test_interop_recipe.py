"""The published LlamaForCausalLM recipe on our `cache-index` export: command lines of its compile
scripts from its folder layout, then its session's calls in its generation loop, on its SDK.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_llama import NumpyLlama, TinyLlama
from vendor_client import Sdk, Session

from qaic_ray.contract import IoContract
from qaic_ray.emulator import folder
from qaic_ray.emulator.install import install
from qaic_ray.export.export import export_model
from qaic_ray.model.checkpoint import open_checkpoint
from qaic_ray.options import ExportOptions

ROWS = 2
CTX_LEN = 16
PROMPT_LEN = 4
PROMPTS = ([5, 17, 3], [9, 2, 44, 31, 8, 20])
LLAMA = TinyLlama(continuous=False)


def write_checkpoint(where: Path) -> None:
    """The tiny Llama's weights under the names of transformers' LlamaForCausalLM."""
    linear = {
        "self_attn.q_proj": "wq", "self_attn.k_proj": "wk", "self_attn.v_proj": "wv",
        "self_attn.o_proj": "wo", "mlp.gate_proj": "wgate", "mlp.up_proj": "wup",
        "mlp.down_proj": "wdown",
    }  # fmt: skip
    norms = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    w = LLAMA.weights
    tensors = {
        "model.embed_tokens.weight": w["embed"],
        "model.norm.weight": w["norm"],
        "lm_head.weight": w["lm_head"].T,
    }
    for i in range(LLAMA.num_layers):
        layer = f"model.layers.{i}."
        tensors.update({f"{layer}{k}.weight": w[f"{v}_{i}"].T for k, v in linear.items()})
        tensors.update({f"{layer}{k}.weight": w[f"{v}_{i}"] for k, v in norms.items()})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "hidden_size": LLAMA.hidden, "intermediate_size": LLAMA.ffn, "vocab_size": LLAMA.vocab,
        "num_hidden_layers": LLAMA.num_layers, "num_attention_heads": LLAMA.num_heads,
        "num_key_value_heads": LLAMA.num_kv_heads, "head_dim": LLAMA.head_dim,
        "max_position_embeddings": LLAMA.max_positions, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    where.mkdir()
    save_file(
        {k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()},
        where / "model.safetensors",
    )
    (where / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Sdk:
    root = tmp_path_factory.mktemp("sdk") / "qti-aic"
    install(root, apps_version="1.14.2")
    return Sdk(root)


@pytest.fixture(scope="module")
def recipe(sdk: Sdk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's folder: `tiny/` as its export step leaves it, and both programs in `qpc/`."""
    where = tmp_path_factory.mktemp("recipe")
    write_checkpoint(where / "checkpoint")
    options = ExportOptions(io=IoContract.CACHE_INDEX, opset=13, continuous_batching=False)
    checkpoint = open_checkpoint(str(where / "checkpoint"))
    export_model(checkpoint, options, output=where / "tiny", verify="off")
    sizes = {"batch_size": str(ROWS), "ctx_len": str(CTX_LEN)}
    prefill, decode = dict(sizes, seq_len=str(PROMPT_LEN)), dict(sizes, seq_len="1")
    for name, entries, target in (
        ("specializations.json", [prefill, decode], "tiny-4pl"),
        ("specializations_pl1.json", [decode], "tiny-1pl"),
    ):
        (where / name).write_text(json.dumps({"specializations": entries}, indent="\t"))
        (where / "qpc").mkdir(exist_ok=True)
        sdk.compile(
            "qaic-exec", "-m=tiny/generatedModels/tiny_fp16_simplified.onnx", "-aic-hw",
            "-aic-hw-version=2.0", f"-network-specialization-config={name}", "-convert-to-fp16",
            "-aic-num-cores=14", "-custom-IO-list-file=tiny/custom_io.yaml", "-compile-only",
            f"-aic-binary-dir=qpc/{target}", "-retained-state", cwd=where,
        )  # fmt: skip
    return where


@pytest.fixture(autouse=True)
def own_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(folder.STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def sizes_of(session: Session) -> tuple[int, int]:
    """Prompt and context length; a program with one specialization lists no allowed shapes."""
    ids, mask = session.index["input_ids"], session.index["attention_mask"]
    if session.allowed_shapes:
        prompt_len = max(entry[ids][1][1] for entry in session.allowed_shapes)
        return prompt_len, session.allowed_shapes[0][mask][1][1]
    return 1, session.bindings[mask].dims[1]


def answer(session: Session) -> list[list[int]]:
    """Greedy tokens up to the end of the context; the mask stays on the card after the prefill."""
    prompt_len, ctx_len = sizes_of(session)
    session.skip(n for n in session.names(inputs=True) if n.startswith("past_"))
    session.skip(n for n in session.names(inputs=False) if n.endswith("_RetainedState"))
    input_len = -(-max(map(len, PROMPTS)) // prompt_len) * prompt_len
    ids = np.full((ROWS, input_len), 2)
    mask = np.zeros((ROWS, ctx_len), bool)
    for row, prompt in enumerate(PROMPTS):
        ids[row, input_len - len(prompt) :] = prompt
        mask[row, input_len - len(prompt) : input_len] = True
    positions = (np.cumsum(mask[:, :input_len], 1) - 1) * mask[:, :input_len]
    cache_index = np.array([0])
    for start in range(0, input_len, prompt_len):
        chunk = slice(start, start + prompt_len)
        seen = mask.copy()
        seen[:, chunk.stop :] = False
        feeds = {"input_ids": ids[:, chunk], "position_ids": positions[:, chunk]}
        outputs = session.run({**feeds, "attention_mask": seen, "cache_index": cache_index})
        cache_index += prompt_len
    session.skip(["attention_mask"])
    tokens = [outputs["logits"].reshape(ROWS, 1, -1).argmax(2)]
    position_ids = mask.sum(1, keepdims=True)
    while cache_index[0] < ctx_len:
        feeds = {"input_ids": tokens[-1], "position_ids": position_ids, "cache_index": cache_index}
        tokens.append(session.run(feeds)["logits"].reshape(ROWS, 1, -1).argmax(2))
        position_ids = position_ids + 1
        cache_index += 1
    found: list[list[int]] = np.concatenate(tokens, axis=1).tolist()
    return found


def truth(row: int, num_tokens: int) -> list[int]:
    with np.errstate(under="ignore"):
        weights = {k: v.astype(np.float16).astype(np.float32) for k, v in LLAMA.weights.items()}
    model = NumpyLlama(LLAMA, weights, round_kv=lambda x: x.astype(np.float16))
    tokens = list(PROMPTS[row])
    for position in range(len(PROMPTS[row]) + num_tokens - 1):
        logits = model.forward(row, tokens[position], position)
        if position >= len(PROMPTS[row]) - 1:
            tokens.append(int(logits.argmax()))
    return tokens[len(PROMPTS[row]) :]


@pytest.mark.parametrize(("qpc", "prompt_len"), [("tiny-4pl", PROMPT_LEN), ("tiny-1pl", 1)])
def test_greedy_text(sdk: Sdk, recipe: Path, qpc: str, prompt_len: int) -> None:
    session = Session(sdk, recipe / "qpc" / qpc, [0])
    assert sizes_of(session) == (prompt_len, CTX_LEN)
    assert bool(session.allowed_shapes) == (prompt_len > 1)
    found = answer(session)
    assert len(found[0]) == (9 if prompt_len > 1 else 11)
    assert found == [truth(row, len(found[row])) for row in range(ROWS)]
    session.close()


def test_the_runtime_works_with_the_onnx_that_the_recipe_pins(sdk: Sdk, recipe: Path) -> None:
    """onnx 1.14 has no inliner; only compiling needs it."""
    script = """
import sys, onnx
sys.modules["onnx.inliner"] = None
vars(onnx).pop("inliner", None)
sys.path.append(sys.argv[1])
import qaicrt
context = qaicrt.Context(qaicrt.QIDList([0]))
program = qaicrt.Program(context, None, qaicrt.Qpc(sys.argv[2]))
assert program.load() == program.activate() == qaicrt.QStatus.QS_SUCCESS
"""
    library = sdk.root / "dev" / "lib" / platform.machine()
    done = subprocess.run(
        [sys.executable, "-c", script, str(library), str(recipe / "qpc" / "tiny-4pl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
