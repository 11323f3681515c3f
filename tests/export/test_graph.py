"""The authored graph against the published interface, and its cache functions against numpy."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from operator_forms import (
    CONSTANT,
    DATA,
    SHAPE,
    Form,
    Input,
    operator_forms,
    unknown_forms,
)

from qaic_ray.contract import IoContract
from qaic_ray.errors import CheckpointError, UsageError
from qaic_ray.export.architecture import Architecture, read_architecture
from qaic_ray.export.builder import broadcast
from qaic_ray.export.check.replay import cut_layers, kept_layers
from qaic_ray.export.functions import (
    CLOUD_DOMAIN,
    PLAIN_DOMAIN,
    SKIP,
    card_functions,
    use_plain_functions,
)
from qaic_ray.export.graph import AuthoredGraph, author
from qaic_ray.options import ExportOptions

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


def architecture(**changes: Any) -> Architecture:
    return read_architecture(CONFIG | changes)


def authored(continuous: bool = False, **changes: Any) -> AuthoredGraph:
    return author(architecture(**changes), ExportOptions(continuous_batching=continuous))


CACHE_INDEX = IoContract.CACHE_INDEX
DTYPES = ("float32", "float16")
LOGITS = ("last", "all", "num_logits_to_keep")
OPSETS = (13, 17)
ALL_OPTIONS = [
    ExportOptions(opset=opset, dtype=dtype, logits=logits, next_tokens=next_tokens, **chosen)
    for chosen in (
        {"continuous_batching": False},
        {"continuous_batching": True},
        {"continuous_batching": False, "replicate_kv_heads": 3},
        {"continuous_batching": False, "io": CACHE_INDEX},
    )
    for opset in OPSETS
    for dtype in DTYPES
    for logits in LOGITS
    for next_tokens in (False, True)
    if (chosen.get("io"), logits) != (CACHE_INDEX, "num_logits_to_keep")
] + [
    ExportOptions(continuous_batching=continuous, comp_ctx_lengths=True)
    for continuous in (False, True)
]
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama with biases": {"attention_bias": True, "mlp_bias": True},
    "Llama with one kv head": {"num_key_value_heads": 1},
    "Llama with every kv head": {"num_key_value_heads": 6},
    "Mistral": {"architectures": ["MistralForCausalLM"]},
    "Qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "Qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "Granite": {
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
}


def described(values: Any) -> dict[str, tuple[int, list[Any]]]:
    """Name -> element type and dims, in order."""
    return {
        v.name: (
            v.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    }


@pytest.mark.parametrize("continuous", [False, True])
def test_interface_is_the_published_one(continuous: bool) -> None:
    graph = authored(continuous)
    weights = {w.name for w in graph.weights}
    inputs = described(v for v in graph.model.graph.input if v.name not in weights)
    rows = "full_batch_size" if continuous else "batch_size"
    past = (TensorProto.FLOAT, [rows, 2, "ctx_len", 8])
    ids = (TensorProto.INT64, ["batch_size", "seq_len"])
    names = [f"past_{kind}.{layer}" for layer in range(3) for kind in ("key", "value")]
    expected: dict[str, tuple[int, list[Any]]] = {"input_ids": ids, "position_ids": ids}
    expected |= dict.fromkeys(names, past)
    if continuous:
        expected["batch_index"] = (TensorProto.INT64, ["batch_size", 1])
    assert inputs == expected
    assert list(inputs) == list(expected)
    outputs = described(graph.model.graph.output)
    logits = (TensorProto.FLOAT, ["batch_size", 1, 100])
    assert outputs == {"logits": logits} | {f"{name}_RetainedState": past for name in names}
    assert next(iter(outputs)) == "logits"


@pytest.mark.parametrize("continuous", [False, True])
def test_operators_per_layer_are_the_published_ones(continuous: bool) -> None:
    model = authored(continuous).model
    suffix = "CB" if continuous else ""
    custom = Counter((n.domain, n.op_type) for n in model.graph.node if n.domain)
    assert custom == {
        ("com.qti.aisw.onnx", "CustomRMSNorm"): 2 * 3 + 1,
        ("com.qualcomm.cloud", f"CtxScatter{suffix}"): 2 * 3,
        ("com.qualcomm.cloud", f"CtxGather{suffix}"): 2 * 3,
    }
    assert {(f.domain, f.name) for f in model.functions} == set(custom)
    versions = {o.domain: o.version for o in model.opset_import}
    assert versions == {"": 17, "com.qti.aisw.onnx": 1, "com.qualcomm.cloud": 1}
    assert model.ir_version == 8


def test_cache_index_interface_is_the_recipes() -> None:
    """Order, names, types and dims of what the recipe's own export makes."""
    graph = author(
        architecture(), ExportOptions(io=CACHE_INDEX, opset=13, continuous_batching=False)
    )
    weights = {w.name for w in graph.weights}
    inputs = described(v for v in graph.model.graph.input if v.name not in weights)
    past = (TensorProto.FLOAT, ["batch_size", 2, "ctx_len", 8])
    mask = (TensorProto.BOOL, ["batch_size", "ctx_len"])
    ids = (TensorProto.INT64, ["batch_size", "seq_len"])
    names = [f"past_{kind}.{layer}" for layer in range(3) for kind in ("key", "value")]
    expected: dict[str, tuple[int, list[Any]]] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": ids,
        **dict.fromkeys(names, past),
        "cache_index": (TensorProto.INT64, [1]),
    }
    assert list(inputs.items()) == list(expected.items())
    outputs = described(graph.model.graph.output)
    expected = {
        "logits": (TensorProto.FLOAT, ["batch_size", 100]),
        **{f"{name}_RetainedState": past for name in names},
        "attention_mask_RetainedState": mask,
    }
    assert list(outputs.items()) == list(expected.items())
    assert {o.domain: o.version for o in graph.model.opset_import} == {"": 13}
    assert not graph.model.functions


def test_scattered_updates_are_as_many_as_their_indices() -> None:
    """What a compiler of the recipe's time refuses (quic/cloud-ai-sdk issue 2)."""
    graph = author(
        architecture(), ExportOptions(io=CACHE_INDEX, opset=13, continuous_batching=False)
    ).model.graph
    values = described([*graph.value_info, *graph.output, *graph.input])
    scatters = [node for node in graph.node if node.op_type == "ScatterND"]
    assert len(scatters) == 2 * 3 + 1
    for node in scatters:
        data, indices, updates = (values[name][1] for name in node.input)
        assert updates == indices[:-1] + data[indices[-1] :]


@pytest.mark.parametrize(
    ("options", "name", "dims"),
    [
        ({"logits": "all"}, "logits", ["batch_size", "seq_len", 100]),
        ({"logits": "all", "io": CACHE_INDEX}, "logits", ["batch_size", "seq_len", 100]),
        (
            {"logits": "num_logits_to_keep"},
            "logits",
            ["batch_size", "num_logits_to_keep", 100],
        ),
        ({"next_tokens": True}, "next_tokens", ["batch_size", 1, 1]),
        ({"next_tokens": True, "io": CACHE_INDEX}, "next_tokens", ["batch_size", 1]),
        ({"next_tokens": True, "logits": "all"}, "next_tokens", ["batch_size", "seq_len", 1]),
    ],
)
def test_answer_is_what_was_asked_for(options: dict[str, Any], name: str, dims: list[Any]) -> None:
    outputs = described(
        author(
            architecture(), ExportOptions(opset=17, continuous_batching=False, **options)
        ).model.graph.output
    )
    kind = TensorProto.INT64 if name == "next_tokens" else TensorProto.FLOAT
    assert next(iter(outputs.items())) == (name, (kind, dims))


def test_inputs_that_only_have_a_length_stand_where_they_are_published() -> None:
    options = ExportOptions(
        continuous_batching=True, logits="num_logits_to_keep", comp_ctx_lengths=True
    )
    graph = author(architecture(), options)
    weights = {w.name for w in graph.weights}
    inputs = described(v for v in graph.model.graph.input if v.name not in weights)
    expected_names = ["past_value.2", "comp_ctx_lengths", "batch_index", "num_logits_to_keep"]
    assert list(inputs)[-4:] == expected_names
    assert inputs["comp_ctx_lengths"] == (TensorProto.INT64, ["comp_ctx_lengths"])
    expected = (TensorProto.INT64, ["num_logits_to_keep", 1])
    assert inputs["num_logits_to_keep"] == expected


@pytest.mark.parametrize("num_copies", [1, 3])
def test_kv_heads_are_there_so_many_times(num_copies: int) -> None:
    graph = author(
        architecture(), ExportOptions(replicate_kv_heads=num_copies, continuous_batching=False)
    )
    inputs = described(graph.model.graph.input)
    assert inputs["past_key.0"][1] == ["batch_size", 2 * num_copies, "ctx_len", 8]
    specs = {w.name: w for w in graph.weights}
    key = specs["model.layers.0.self_attn.k_proj.weight"]
    assert key.shape == (24, 16 * num_copies)
    assert key.source_shape == (16, 24)
    query = specs["model.layers.0.self_attn.q_proj.weight"]
    assert query.shape == query.source_shape[::-1] == (24, 48)


def test_kv_heads_cannot_be_more_than_query_heads() -> None:
    with pytest.raises(UsageError, match="divide the 3 query heads"):
        author(architecture(), ExportOptions(replicate_kv_heads=2, continuous_batching=False))


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
def test_checker_and_shape_inference_agree(options: ExportOptions) -> None:
    graph = author(architecture(num_hidden_layers=1), options)
    onnx.checker.check_model(graph.model, full_check=True)
    ours = described([*graph.model.graph.value_info, *graph.model.graph.output])
    results = {name for node in graph.model.graph.node for name in node.output}
    assert results == ours.keys()
    bare = onnx.ModelProto.FromString(graph.model.SerializeToString())
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True)
    compared = 0
    for name, (kind, dims) in described(inferred.graph.value_info).items():
        assert kind == ours[name][0], name
        if not dims or len(dims) != len(ours[name][1]):
            continue
        for theirs, own in zip(dims, ours[name][1], strict=True):
            if theirs in ("batch_size", "seq_len") or (isinstance(theirs, int) and theirs):
                assert theirs == own, name
                compared += 1
    assert compared > 70


def types_of(model: Any) -> dict[str, tuple[int, int]]:
    values = described([*model.graph.value_info, *model.graph.input, *model.graph.output])
    types = {name: (kind, len(dims)) for name, (kind, dims) in values.items()}
    return types | {t.name: (t.data_type, len(t.dims)) for t in model.graph.initializer}


@pytest.mark.parametrize("kind", KINDS)
def test_only_forms_of_exports_that_compile_on_cards(kind: str) -> None:
    decoder = architecture(num_hidden_layers=1, **KINDS[kind])
    for options in ALL_OPTIONS:
        if decoder.num_groups % options.replicate_kv_heads:
            continue
        graph = author(decoder, options)
        weights = [w.name for w in graph.weights]
        found = operator_forms(graph.model, types_of(graph.model), weights)
        assert unknown_forms(found, options.graph_opset) == {}, options


def test_a_form_that_nobody_uses_is_found() -> None:
    """A Reshape to a shape that is computed from data, and an operator of no public export."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 13]>
        g (float[2, 3] x, int64[1] wanted) => (float[n] y) {
            flat = Reshape (x, wanted)
            y = Elu (flat)
        }"""
    )
    types = {"x": (1, 2), "wanted": (7, 1), "flat": (1, 1), "y": (1, 1)}
    unknown = unknown_forms(operator_forms(model, types), 13)
    assert [form.operator for form in unknown] == ["Reshape", "Elu"]


def test_what_is_constant_may_be_fed_to_what_takes_data() -> None:
    data = Form("Add", "{}", (Input("float", 3, DATA), Input("float", 1, SHAPE)))
    constant = Form("Add", "{}", (Input("float", 3, DATA), Input("float", 1, CONSTANT)))
    assert data.covers(constant)
    assert not constant.covers(data)
    assert not data.covers(Form("Add", '{"axis": 1}', data.inputs))
    assert not data.covers(Form("Add", "{}", (Input("float", 4, DATA), data.inputs[1])))
    for value in data.inputs:
        assert Input.parse(str(value)) == value


def test_every_weight_matmul_is_constant_and_k_by_n() -> None:
    graph = authored()
    specs = {w.name: w for w in graph.weights}
    found = {}
    for node in graph.model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in specs:
            found[node.name] = specs[node.input[1]]
    assert len(found) == 7 * 3 + 1
    query = found["/model/layers.2/self_attn/q_proj/MatMul"]
    assert (query.source, query.shape) == ("model.layers.2.self_attn.q_proj.weight", (24, 48))
    assert query.transpose
    assert found["/lm_head/MatMul"].shape == (24, 100)


def test_tied_embeddings_share_their_source() -> None:
    weights = {w.name: w for w in authored(tie_word_embeddings=True).weights}
    assert weights["lm_head.weight"].source == "model.embed_tokens.weight"
    assert weights["model.embed_tokens.weight"].shape == (100, 24)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
def test_what_the_old_compiler_refuses_is_not_there(options: ExportOptions) -> None:
    model = author(architecture(num_hidden_layers=1), options).model
    constants = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Range":
            assert node.input[0] in constants
            assert node.input[2] in constants
        if node.op_type in ("Slice", "Unsqueeze", "ReduceSum"):
            assert constants.issuperset(node.input[1:]), node.name
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)


def test_names_are_paths_of_modules() -> None:
    names = {
        n.name
        for n in author(architecture(), ExportOptions(continuous_batching=False)).model.graph.node
    }
    assert "/model/layers.2/self_attn/q_proj/MatMul" in names
    assert "/model/layers.0/mlp/act_fn/Sigmoid" in names
    assert "/lm_head/MatMul" in names
    assert all(name.startswith("/") for name in names)


def test_eighty_layers_are_authored_at_once() -> None:
    graph = authored(num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, head_dim=128)
    assert sum(n.op_type == "Softmax" for n in graph.model.graph.node) == 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads .*a divisor of"),
        ({"head_dim": 7}, "head_dim .* even"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope type 'spiral'"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1] * 4}}, "one table for every"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ],
)
def test_what_we_do_not_compute_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        architecture(**changes)


def test_sliding_window_bounds_the_context() -> None:
    assert architecture(sliding_window=16).max_position == 16
    assert architecture(sliding_window=512).max_position == 64
    assert architecture(sliding_window=None).max_position == 64


@given(st.data())
def test_broadcast_is_numpys(data: st.DataObject) -> None:
    full = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    shapes = []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = [d if data.draw(st.booleans()) else 1 for d in full]
        shapes.append(tuple(shape[data.draw(st.integers(0, len(full) - 1)) :]))
    assert broadcast(*shapes) == np.broadcast_shapes(*shapes)


def test_broadcast_refuses_two_names() -> None:
    with pytest.raises(ValueError, match="do not broadcast"):
        broadcast(("seq_len",), ("ctx_len",))


def cache_session(name: str, *, opset: int, plain: bool) -> onnxruntime.InferenceSession:
    """A model of one call of a cache function."""
    functions = card_functions(continuous=name.endswith("CB"), opset=opset)
    function = next(f for f in functions if f.name == name)
    kinds = {"data": TensorProto.FLOAT, "updates": TensorProto.FLOAT}
    ranks = {"data": 4, "updates": 4, "ctx_indices": 3, "comp_ctx_len": 0}
    inputs = [
        helper.make_tensor_value_info(i, kinds.get(i, TensorProto.INT64), [None] * ranks.get(i, 2))
        for i in function.input
    ]
    node = helper.make_node(name, list(function.input), ["out"], domain=CLOUD_DOMAIN)
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * 4)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(CLOUD_DOMAIN, 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [output]),
        opset_imports=opsets,
        functions=[function],
        ir_version=8,
    )
    if plain:
        use_plain_functions(model)
        assert PLAIN_DOMAIN in {o.domain for o in model.opset_import}
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


SESSIONS = {
    (name, opset, plain): cache_session(name, opset=opset, plain=plain)
    for name in ("CtxScatter", "CtxGather", "CtxScatterCB", "CtxGatherCB")
    for opset in OPSETS
    for plain in (False, True)
}


@given(
    opset=st.sampled_from(OPSETS),
    plain=st.booleans(),
    continuous=st.booleans(),
    sizes=st.tuples(*[st.integers(1, 4)] * 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_cache_functions_do_what_they_say(
    opset: int, plain: bool, continuous: bool, sizes: tuple[int, ...], seed: int
) -> None:
    """Written tokens are read back; what is outside the cache is dropped, if promised."""
    batch, heads, ctx_len, seq_len, dim = sizes
    rng = np.random.default_rng(seed)
    num_slots = batch + 2 if continuous else batch
    data = rng.standard_normal((num_slots, heads, ctx_len, dim)).astype(np.float32)
    seq_len = min(seq_len, ctx_len)
    updates = rng.standard_normal((batch, heads, seq_len, dim)).astype(np.float32)
    positions = np.stack([rng.permutation(ctx_len)[:seq_len] for _ in range(batch)])
    if plain:
        outside = rng.choice([-1, ctx_len, SKIP], positions.shape)
        positions = np.where(rng.random(positions.shape) < 0.4, outside, positions)
    slots = rng.permutation(num_slots)[:batch] if continuous else np.arange(batch)
    extra = {"batch_index": slots[:, None]} if continuous else {}
    suffix = "CB" if continuous else ""
    expected = data.copy()
    for row in range(batch):
        for token in range(seq_len):
            if 0 <= positions[row, token] < ctx_len:
                expected[slots[row], :, positions[row, token]] = updates[row, :, token]
    feed = {"data": data, "position_ids": positions, "updates": updates, **extra}
    (written,) = SESSIONS[f"CtxScatter{suffix}", opset, plain].run(None, feed)
    np.testing.assert_array_equal(written, expected)

    wanted = np.arange(ctx_len)[None, None].repeat(batch, 0)
    limit = rng.integers(0, ctx_len, (batch, 1, 1))
    skipped = wanted > limit if plain else np.zeros_like(wanted, bool)
    indices = np.where(skipped, SKIP, wanted)
    feed = {"data": written, "ctx_indices": indices, **extra}
    session = SESSIONS[f"CtxGather{suffix}", opset, plain]
    if any(i.name == "comp_ctx_len" for i in session.get_inputs()):
        feed["comp_ctx_len"] = np.array(ctx_len)
    (gathered,) = session.run(None, feed)
    seen = np.broadcast_to(~skipped[..., None], gathered.shape)
    np.testing.assert_array_equal(gathered[seen], expected[slots][seen])


def test_cutting_keeps_a_valid_graph_of_the_kept_layers() -> None:
    model = authored(num_hidden_layers=6).model
    cut_layers(model, kept_layers(6, "quick"))
    assert kept_layers(6, "quick") == (0, 1, 4, 5)
    onnx.checker.check_model(model, full_check=True)
    layers = {n.name.split("/")[2] for n in model.graph.node if n.name.startswith("/model/layers.")}
    assert layers == {"layers.0", "layers.1", "layers.4", "layers.5"}
    norm = next(n for n in model.graph.node if n.name.startswith("/model/layers.4/input_layernorm"))
    assert norm.input[0] == "/model/layers.1/Add_1_output_0"
    names = {v.name for v in model.graph.input}
    assert "past_key.4" in names
    assert "past_key.2" not in names


def test_cutting_nothing_changes_nothing() -> None:
    model = authored().model
    before = model.SerializeToString(deterministic=True)
    cut_layers(model, kept_layers(3, "full"))
    assert model.SerializeToString(deterministic=True) == before
