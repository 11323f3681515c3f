"""What QEfficient's `export`, `compile` and `generate` need, release 1.20 and 1.23: files like
theirs, compiled by their command line, run by their calls, against the same model in numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from compiled import CTX_LEN, PROMPT_LEN, SLOTS, write_inputs
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tiny_llama import NumpyLlama, TinyLlama
from vendor_client import Sdk, Session

from qaic_ray.emulator import compiler, folder
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram
from qaic_ray.emulator.install import install
from qaic_ray.emulator.lowering import dims, graph

PROMPTS = ([5, 17, 3], [9, 2, 44, 31, 8, 20], [60, 1])
NUM_STEPS = 5


class Release(NamedTuple):
    """How a release of QEfficient calls the SDK that it is made for."""

    apps_version: str
    command: str
    flags: tuple[str, ...]
    named: bool
    timeout: str
    names_device: bool
    splits_tensors: bool


RELEASES = {
    "1.20": Release(
        "1.20", "qaic-exec", ("-aic-hw-version=2.0", "-compile-only"), named=False,
        timeout="SubmitRetryTimeoutMs", names_device=False, splits_tensors=True,
    ),
    "1.23": Release(
        "1.22", "qaic-compile", ("-aic-hw-version=ai100",), named=True,
        timeout="dataPathTimeoutMs", names_device=True, splits_tensors=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def open_sdk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sdk]:
    opened: dict[str, Sdk] = {}

    def open_(apps_version: str) -> Sdk:
        if apps_version not in opened:
            root = tmp_path_factory.mktemp("sdk") / "qti-aic"
            install(root, apps_version=apps_version)
            opened[apps_version] = Sdk(root)
        return opened[apps_version]

    return open_


@pytest.fixture(autouse=True)
def own_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(folder.STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


COMPUTED_DIMS = """
<ir_version: 8, opset_import: ["": 17, "com.qualcomm.cloud": 1]>
view (int64[batch_size, seq_len] ids, float[full_batch_size, 2, ctx_len, 8] past,
      int64[batch_size, 1] slots, int64[comp_ctx_lengths] computed) => (float[a, b, c] out)
{
  zero = Constant <value = int64 {0}> ()
  one = Constant <value = int64 {1}> ()
  i0 = Constant <value = int64[1] {0}> ()
  last = Constant <value = int64[1] {-1}> ()
  eight = Constant <value = int64[1] {8}> ()
  hidden = Gather (embed, ids)
  sizes = Shape (hidden)
  rows = Gather (sizes, i0)
  tokens_0d = Gather (sizes, one)
  tokens = Unsqueeze (tokens_0d, i0)
  view = Concat <axis = 0> (rows, tokens, last, eight)
  heads = Reshape (hidden, view)
  flat_shape = Concat <axis = 0> (last, eight)
  flat = Reshape (heads, flat_shape)
  length_1d = Shape (computed)
  length = Squeeze (length_1d)
  span = Range (zero, length, one)
  axes = Constant <value = int64[2] {0, 1}> ()
  where = Unsqueeze (span, axes)
  keys = com.qualcomm.cloud.CtxGatherCB (past, slots, where)
  out = Identity (hidden)
}
"""


def test_dims_are_told_from_names_by_two_walks() -> None:
    model = onnx.parser.parse_model(COMPUTED_DIMS)
    embed = np.zeros((7, 32), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(embed, "embed"))
    found = dims.named_dims(model)
    assert found["heads"] == ("batch_size", "seq_len", 4, 8)
    assert found["flat"] == (None, 8)  # a product of two
    assert found["keys"] == ("batch_size", 2, "comp_ctx_lengths", 8)
    assert found["past"] == ("full_batch_size", 2, "ctx_len", 8)
    assert found["out"] == ("batch_size", "seq_len", 32)


def as_exported(path: Path, *, splits_tensors: bool) -> None:
    """Make a model's file what torch.onnx and QEfficient's transforms write.

    The dims of logits have names that nothing gives a value. Where tensors are split off, so are
    those of Constant nodes, as which torch.onnx writes the rotary tables.
    """
    model = onnx.load(path)
    for axis, dim in enumerate(model.graph.output[0].type.tensor_type.shape.dim[:2]):
        dim.dim_param = f"Castlogits_dim_{axis}"
    if splits_tensors:
        data = path.with_name("tiny_0.onnx.data")
        content = b""
        tables = [t for t in model.graph.initializer if t.name in {"cos_table", "sin_table"}]
        for tensor in tables:
            node = helper.make_node("Constant", [], [tensor.name], value=tensor)
            raw, stored = tensor.raw_data, node.attribute[0].t
            stored.ClearField("raw_data")
            stored.data_location = TensorProto.EXTERNAL
            entries = {"location": data.name, "offset": len(content), "length": len(raw)}
            for key, value in entries.items():
                stored.external_data.add(key=key, value=str(value))
            content += raw
            model.graph.node.insert(0, node)
            model.graph.initializer.remove(tensor)
        data.write_bytes(content)
    path.write_bytes(model.SerializeToString())


def build(sdk: Sdk, release: Release, where: Path, llama: TinyLlama, partition: Any = None) -> Path:
    """Compile as QEfficient does; returns the folder of the QPC."""
    write_inputs(where, llama, kv="float16", named=release.named)
    as_exported(where / "tiny.onnx", splits_tensors=release.splits_tensors)
    extra = []
    if partition is not None:
        (where / "mdp_ts_2.json").write_text(json.dumps(partition))
        extra.append(f"-mdp-load-partition-config={where / 'mdp_ts_2.json'}")
    sdk.compile(
        release.command, "-aic-hw", f"-m={where / 'tiny.onnx'}", *release.flags,
        "-retained-state", "-convert-to-fp16", "-aic-num-cores=14", *extra,
        f"-network-specialization-config={where / 'specializations.json'}",
        f"-custom-IO-list-file={where / 'custom_io.yaml'}", f"-aic-binary-dir={where / 'qpc'}",
        cwd=where,
    )  # fmt: skip
    return where / "qpc"


def truth(llama: TinyLlama, slot: int, prompt: list[int]) -> list[int]:
    """Greedy tokens of the model with weights and cache as the card holds them."""
    with np.errstate(under="ignore"):
        weights = {k: v.astype(np.float16).astype(np.float32) for k, v in llama.weights.items()}
    model = NumpyLlama(llama, weights, round_kv=lambda x: x.astype(np.float16))
    tokens = list(prompt)
    for position in range(len(prompt) + NUM_STEPS - 1):
        logits = model.forward(slot, tokens[position], position)
        if position >= len(prompt) - 1:
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def prefill(session: Session, prompts: list[list[int]], vocab: int, **more: Any) -> np.ndarray:
    """Chunks, padded on the right with position -1; returns the next token of each row."""
    session.put({"logits": np.zeros((len(prompts), 1, vocab), np.float32)})
    width = -(-max(map(len, prompts)) // PROMPT_LEN) * PROMPT_LEN
    ids = np.zeros((len(prompts), width), np.int64)
    positions = np.full((len(prompts), width), -1)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
    for start in range(0, width, PROMPT_LEN):
        chunk = slice(start, start + PROMPT_LEN)
        feeds = {"input_ids": ids[:, chunk], "position_ids": positions[:, chunk]}
        outputs = session.run({**feeds, **more})
    return outputs["logits"].argmax(2)


def decode(
    session: Session, first: np.ndarray, lengths: list[int], vocab: int, **more: Any
) -> np.ndarray:
    """Tokens [rows, NUM_STEPS] that follow, the first of them already known."""
    session.put({"logits": np.zeros((len(lengths), 1, vocab), np.float32)})
    tokens, positions = [first], np.array(lengths)[:, None]
    for _ in range(1, NUM_STEPS):
        feeds = {"input_ids": tokens[-1], "position_ids": positions}
        tokens.append(session.run({**feeds, **more})["logits"].argmax(2))
        positions = positions + 1
    return np.concatenate(tokens, axis=1)


def open_session(sdk: Sdk, release: Release, qpc: Path, device_ids: list[int]) -> Session:
    session = Session(
        sdk, qpc, device_ids, timeout=release.timeout, names_device=release.names_device
    )
    session.skip(n for n in session.names(inputs=True) if n.startswith("past_"))
    session.skip(n for n in session.names(inputs=False) if n.endswith("_RetainedState"))
    return session


@pytest.mark.parametrize("name", RELEASES)
def test_continuous_batching(name: str, open_sdk: Callable[[str], Sdk], tmp_path: Path) -> None:
    release, llama = RELEASES[name], TinyLlama()
    sdk = open_sdk(release.apps_version)
    session = open_session(sdk, release, build(sdk, release, tmp_path / "m", llama), [2])
    # Sizes are read from where the generation loop reads them.
    logits, ids = session.index["logits"], session.index["input_ids"]
    vocab = session.allowed_shapes[0][logits][1][2]
    assert vocab == llama.vocab
    assert max(entry[ids][1][1] for entry in session.allowed_shapes) == PROMPT_LEN
    assert session.allowed_shapes[0][session.index["past_key.0"]][1][2] == CTX_LEN

    firsts = [
        prefill(session, [prompt], vocab, batch_index=np.array([[slot]]))
        for slot, prompt in enumerate(PROMPTS)
    ]
    found = decode(
        session, np.concatenate(firsts), [len(p) for p in PROMPTS], vocab,
        batch_index=np.arange(SLOTS)[:, None],
    )  # fmt: skip
    assert found.tolist() == [truth(llama, slot, p) for slot, p in enumerate(PROMPTS)]
    assert sdk.qaicrt.Util().getResourceInfo(2)[1].nspFree == 0
    session.close()
    assert sdk.qaicrt.Util().getResourceInfo(2)[1].nspFree == 14


@pytest.mark.parametrize("name", RELEASES)
def test_regular_batch_on_a_device_that_the_runtime_chooses(
    name: str, open_sdk: Callable[[str], Sdk], tmp_path: Path
) -> None:
    release, llama = RELEASES[name], TinyLlama(continuous=False)
    sdk = open_sdk(release.apps_version)
    session = open_session(sdk, release, build(sdk, release, tmp_path / "m", llama), [])
    prompts = [PROMPTS[0], [4, *PROMPTS[0]], PROMPTS[2]]
    first = prefill(session, prompts, llama.vocab)
    found = decode(session, first, [len(p) for p in prompts], llama.vocab)
    assert found.tolist() == [truth(llama, row, p) for row, p in enumerate(prompts)]
    session.close()


def test_two_devices(open_sdk: Callable[[str], Sdk], tmp_path: Path) -> None:
    release, llama = RELEASES["1.23"], TinyLlama(continuous=False)
    sdk = open_sdk(release.apps_version)
    devices = [{"deviceId": device, "numCores": 14} for device in range(2)]
    partition = {
        "connections": [{"devices": [0, 1], "type": "p2p"}],
        "partitions": [{"name": "Partition0", "devices": devices}],
    }
    qpc = build(sdk, release, tmp_path / "m", llama, partition)
    session = open_session(sdk, release, qpc, [1, 3])
    free = [sdk.qaicrt.Util().getResourceInfo(qid)[1].nspFree for qid in range(4)]
    assert free == [14, 0, 14, 0]
    prompts = [PROMPTS[0]] * SLOTS
    found = decode(session, prefill(session, prompts, llama.vocab), [3] * SLOTS, llama.vocab)
    assert found.tolist() == [truth(llama, 0, PROMPTS[0])] * SLOTS
    session.close()


def test_a_failed_run_can_be_explained(
    open_sdk: Callable[[str], Sdk], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client lists allowed and passed shapes, and tells a skipped buffer by dims `[0]`."""
    release, llama = RELEASES["1.23"], TinyLlama()
    sdk = open_sdk(release.apps_version)
    session = open_session(sdk, release, build(sdk, release, tmp_path / "m", llama), [0])
    session.put({"logits": np.zeros((1, 1, llama.vocab), np.float32)})
    two_tokens = {"input_ids": np.array([[1, 2]]), "position_ids": np.array([[0, 1]])}
    with pytest.raises(ValueError, match="Failed to run"):
        session.run({**two_tokens, "batch_index": np.array([[0]])})
    assert "No matching dimension found" in capfd.readouterr().err
    skipped = {n for n, i in session.index.items() if session.dims[i][1] == [0]}
    assert skipped == {n for n in session.index if n.startswith("past_")}
    session.close()


# How torch.onnx writes `x.expand(rows, 1, width)` and `x.view(rows, -1, width)`.
EXPANDED = """
<ir_version: 8, opset_import: ["": {opset}]>
exported (int64[rows, length] ids, float[rows, length, 6] hidden) => (float[a, b, c] out)
{{
  zero = Constant <value = int64 {{0}}> ()
  first = Constant <value = int64[1] {{0}}> ()
  one = Constant <value = int64[1] {{1}}> ()
  minus = Constant <value = int64[1] {{-1}}> ()
  width = Constant <value = int64[1] {{6}}> ()
  dims = Shape (ids)
  rows = Gather <axis = 0> (dims, zero)
  rows_1d = Unsqueeze (rows, first)
  wanted = Concat <axis = 0> (rows_1d, one, width)
  rank = Shape (wanted)
  ones = ConstantOfShape <value = int64[1] {{1}}> (rank)
  flag = Mul (ones, minus)
  kept = Equal (wanted, flag)
  target = Where (kept, ones, wanted)
  last = ArgMax <axis = 1, keepdims = 1> (ids)
  last_3d = Unsqueeze (last, minus)
  index = Expand (last_3d, target)
  picked = GatherElements <axis = 1> (hidden, index)
  flat = Concat <axis = 0> (rows_1d, minus, width)
  out = Reshape (picked, flat)
}}
"""


@given(st.integers(1, 5), st.integers(1, 7), st.sampled_from([13, 17]))
def test_dims_are_those_that_a_run_gives(rows: int, length: int, opset: int) -> None:
    model = onnx.parser.parse_model(EXPANDED.format(opset=opset))
    feeds = {
        "ids": np.zeros((rows, length), np.int64),
        "hidden": np.zeros((rows, length, 6), np.float32),
    }
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    made = session.run(None, feeds)[0].shape
    assert dims.output_dims(model, {n: a.shape for n, a in feeds.items()}) == {"out": made}


def test_an_operator_that_cannot_take_its_inputs_is_named() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        "g (float[n, 4] x, float[n, 3] y) => (float[a] out) { out = Add (x, y) }"
    )
    with pytest.raises(graph.GraphError, match=r"\[Operator-.*opset_version-17.*Add"):
        dims.output_dims(model, {"x": (2, 4), "y": (2, 3)})


# What sampling on the card keeps: which tokens each slot has seen.
SEEN = """
<ir_version: 8, opset_import: ["": 17, "com.qualcomm.cloud": 1]>
sampler (int64[batch_size, seq_len] ids, int64[batch_size, 1] batch_index,
         bool[batch_size, 1] is_new, bool[slots, vocab] past_seen)
     => (bool[a, b] past_seen_RetainedState)
{
  shape = Shape (ids)
  yes = ConstantOfShape <value = bool[1] {1}> (shape)
  vocab_shape = Shape (past_seen)
  no = ConstantOfShape <value = bool[1] {0}> (vocab_shape)
  kept = Where (is_new, no, past_seen)
  past_seen_RetainedState = com.qualcomm.cloud.CtxScatterCB3D (kept, batch_index, ids, yes)
}
"""


def test_the_state_of_sampling_on_the_card(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(SEEN), tmp_path / "sampler.onnx")
    symbols = [
        f"-onnx-define-symbol={s}" for s in ("batch_size,2", "seq_len,3", "slots,2", "vocab,7")
    ]
    argv = [f"-m={tmp_path / 'sampler.onnx'}", "-aic-hw", "-retained-state", *symbols]
    assert compiler.main([*argv, f"-aic-binary-dir={tmp_path / 'qpc'}"]) == 0
    activation = LoadedProgram(CompiledProgram.open(str(tmp_path / "qpc")), 1).activate()
    expected = np.zeros((2, 7), np.int8)
    skip = 2147483647
    steps = [([[1, 2, 2], [0, -1, skip]], 0), ([[6, 7, 3], [5, 5, 5]], 0), ([[4, -1, -1]] * 2, 1)]
    for tokens, is_new in steps:
        feeds = {
            "ids": np.array(tokens),
            "batch_index": np.array([[1], [0]]),
            "is_new": np.full((2, 1), is_new, np.int8),
        }
        seen = activation.run(feeds, {"past_seen_RetainedState": (2, 7)})
        expected *= 1 - is_new
        for slot, row in zip((1, 0), tokens, strict=True):
            expected[slot, [t for t in row if 0 <= t < 7]] = 1
        np.testing.assert_array_equal(seen["past_seen_RetainedState"], expected)
