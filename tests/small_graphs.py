"""The smallest ONNX decoder that a compiler would take: ids in, one multiplication, a KV cache."""

from __future__ import annotations

from pathlib import Path


def write_decoder(path: Path, *, continuous: bool = False) -> None:
    """Write its file, with the symbols of QEfficient's exports."""
    import onnx
    from onnx import TensorProto, helper

    rows = "full_batch_size" if continuous else "batch_size"
    dims = {"input_ids": ["batch_size", "seq_len"], "past_key.0": [rows, 1, "ctx_len", 8]}
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, dims["input_ids"])
    caches = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims["past_key.0"])
        for name in ("past_key.0", "past_key.0_RetainedState")
    ]
    logits = helper.make_tensor_value_info(
        "logits", TensorProto.FLOAT, ["batch_size", "seq_len", 8]
    )
    weights = [
        helper.make_tensor(name, TensorProto.FLOAT, [8, 8], [0.5] * 64) for name in ("embed", "w")
    ]
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w"], ["logits"]),
        helper.make_node("Identity", ["past_key.0"], ["past_key.0_RetainedState"]),
    ]
    graph = helper.make_graph(nodes, "decoder", [ids, caches[0]], [logits, caches[1]], weights)
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
