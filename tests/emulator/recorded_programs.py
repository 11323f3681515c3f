"""Five programs with random executions, and for each what an independent computation says of it.

The decoders' truth is numpy in float64, that of the others onnxruntime on the ONNX file itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from compiled import CTX_LEN, PROMPT_LEN, SLOTS, write_inputs
from onnx import TensorProto, helper, numpy_helper
from tiny_llama import NumpyLlama, TinyLlama

from qaic_ray.emulator import compiler
from qaic_ray.emulator.numbers import mxfp6

Arrays = dict[str, Any]
FLAGS = ("-aic-hw", "-aic-hw-version=2.0", "-compile-only")
MOST = 100
"""Executions of each program."""
DRAFTED = 4
"""Tokens of a row in a step of the speculative target."""
WORDS, HIDDEN, VOCAB, CLASSES, SIDE = 6, 16, 40, 5, 8


@dataclass(frozen=True)
class Execution:
    """Inputs, the outputs that are asked for, and slot -> (tokens, first position) of decoders."""

    given: Arrays
    wanted: dict[str, tuple[int, ...]]
    rows: dict[int, tuple[list[int], int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Where:
    """The first execution and tensor that two programs differ in, and by how much each element."""

    execution: int
    tensor: str
    apart: Any


@dataclass(frozen=True)
class Change:
    """An element of a weight, and what the program stores it as: float32, float16 or mxfp6."""

    weight: str
    place: tuple[int, ...]
    stored: str

    @property
    def text(self) -> str:
        """The element."""
        return f"{self.weight}{list(self.place)}"

    def by_one_step(self, model: Any) -> Any:
        """The model whose element is the next one that can be stored."""

        def up(values: Any) -> Any:
            if self.stored == "float32":
                next_number(values, self.place)
            elif self.stored == "float16":
                half = values[self.place].astype(np.float16)
                values[self.place] = np.nextafter(half, np.float16(np.inf))
            else:
                before = mxfp6.quantize(values)[self.place]
                while mxfp6.quantize(values)[self.place] == before:
                    values[self.place] += 2.0**-8
            return values

        return with_weight(model, self.weight, up)

    def by_an_ulp_of_float32(self, model: Any) -> Any:
        """The model whose element is the next number."""
        return with_weight(model, self.weight, lambda values: next_number(values, self.place))


def next_number(values: Any, place: tuple[int, ...]) -> Any:
    """The array, in which one element is the next float32."""
    values[place] = np.nextafter(values[place], np.float32(np.inf))
    return values


@dataclass(frozen=True)
class Recorded:
    """A program: its ONNX, flags, executions, what gets changed, and who says what that does."""

    name: str
    model: Any
    flags: tuple[str, ...]
    executions: list[Execution]
    changes: tuple[Change, ...]
    between: Callable[[Any, Any], Where | None]
    argv: Callable[[Path], list[str]] = lambda _: []

    def truth(self, first: Any, second: Any) -> Where | None:
        """Where two models with weights as they are stored differ first."""
        return self.between(rounded(first, self.flags), rounded(second, self.flags))

    def compile(self, folder: Path, model: Any) -> Path:
        """The folder of the QPC."""
        folder.mkdir(parents=True)
        argv = [*self.argv(folder), *FLAGS, *self.flags]
        onnx.save(model, folder / "net.onnx")
        argv += [f"-m={folder / 'net.onnx'}", f"-aic-binary-dir={folder / 'qpc'}"]
        assert compiler.main(list(dict.fromkeys(argv))) == 0
        return folder / "qpc"


def with_weight(model: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """A copy of a model with one of its weights changed."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(np.array(numpy_helper.to_array(tensor))), name))
    return copy


def weights_of(model: Any) -> dict[str, Any]:
    return {t.name: np.array(numpy_helper.to_array(t)) for t in model.graph.initializer}


# -- decoders


def decoder(name: str, llama: TinyLlama, *flags: str, drafted: int = 1, kv: str = "") -> Recorded:
    """A Llama with slots; one that checks drafts has the logits of every token."""
    model = llama.onnx()
    if drafted > 1:
        logits = next(node for node in model.graph.node if "logits" in node.output)
        logits.input[0] = "final"
        dims = next(o for o in model.graph.output if o.name == "logits").type.tensor_type.shape
        dims.dim[1].ClearField("dim_value")
        dims.dim[1].dim_param = "seq_len"
    executions = list(islice(_decoder_steps(llama, random.Random(name), drafted), MOST))
    token = _latest_token(executions)
    place = (token, int(np.abs(llama.weights["embed"][token]).argmax()))
    # A table is no right operand of a MatMul: -mxfp6-matmul leaves it in fp16.
    changes = [Change("embed", place, "float16")]
    if "-mxfp6-matmul" in flags:
        changes.append(Change("lm_head", (7, 5), "mxfp6"))
    return Recorded(
        name=name,
        model=model,
        flags=flags,
        executions=executions,
        changes=tuple(changes),
        between=lambda first, second: _by_numpy(llama, executions, first, second, drafted > 1),
        argv=lambda folder: _decoder_argv(folder, llama, drafted, kv),
    )


def _decoder_argv(folder: Path, llama: TinyLlama, drafted: int, kv: str) -> list[str]:
    argv = write_inputs(folder / "made", llama, kv=kv or None)
    shapes = folder / "made" / "specializations.json"
    document = json.loads(shapes.read_text())
    document["specializations"][1]["seq_len"] = str(drafted)
    shapes.write_text(json.dumps(document))
    return [a for a in argv if not a.startswith(("-m=", "-aic-binary-dir=")) and a not in FLAGS]


def _decoder_steps(llama: TinyLlama, rng: random.Random, drafted: int) -> Iterator[Execution]:
    """Prefills of one slot, and steps of some of them, each where it stands."""
    lengths = [0] * SLOTS
    while True:
        is_prefill = rng.random() < 0.4
        most = PROMPT_LEN if is_prefill else drafted
        slots = [rng.randrange(SLOTS)] if is_prefill else sorted(rng.sample(range(SLOTS), 2))
        rows = {}
        for slot in slots:
            count = rng.randint(1, most)
            if lengths[slot] + count > CTX_LEN:
                lengths[slot] = 0
            # Rare tokens: which of them comes last is seen late.
            tokens = [1 + int((llama.vocab - 1) * rng.random() ** 4) for _ in range(count)]
            rows[slot] = tokens, lengths[slot]
            lengths[slot] += count
        in_batch = slots if is_prefill else list(range(SLOTS))
        ids = np.zeros((len(in_batch), most), np.int64)
        positions = np.full_like(ids, -1)
        for row, slot in enumerate(in_batch):
            tokens, start = rows.get(slot, ([], 0))
            ids[row, : len(tokens)] = tokens
            positions[row, : len(tokens)] = np.arange(start, start + len(tokens))
        given = {"input_ids": ids, "position_ids": positions}
        given["batch_index"] = np.array(in_batch, np.int64)[:, None]
        columns = most if drafted > 1 else 1
        yield Execution(given, {"logits": (len(in_batch), columns, llama.vocab)}, rows)


def _latest_token(executions: list[Execution]) -> int:
    """Of the tokens that come first at the end of a row, the one that comes last of all.

    What follows a token at once is seen; of those before it only the cache is, which is rounded.
    """
    first: dict[int, tuple[int, bool]] = {}
    for number, execution in enumerate(executions):
        for tokens, _ in execution.rows.values():
            for at, token in enumerate(tokens):
                first.setdefault(token, (number, at == len(tokens) - 1))
    return max((token for token in first if first[token][1]), key=lambda token: first[token])


def _by_numpy(
    llama: TinyLlama, executions: list[Execution], first: Any, second: Any, all_tokens: bool
) -> Where | None:
    """Both models in float64, token by token; the cache is not rounded."""
    pair = [NumpyLlama(llama, weights_of(model)) for model in (first, second)]
    for number, execution in enumerate(executions):
        apart = np.zeros(execution.wanted["logits"])
        slots = list(execution.given["batch_index"][:, 0])
        for slot, (tokens, start) in execution.rows.items():
            row = slots.index(slot)
            for at, token in enumerate(tokens):
                made = [model.forward(slot, token, start + at) for model in pair]
                if all_tokens or at == len(tokens) - 1:
                    apart[row, at if all_tokens else 0] = np.abs(made[0] - made[1])
        if apart.any():
            return Where(number, "logits", apart)
    return None


# -- programs without a state


def encoder(name: str) -> Recorded:
    """Embeddings of sentences: one layer of attention under a mask, a norm, a mean of the words."""
    values = np.random.default_rng(1)
    weights = {"table": values.standard_normal((VOCAB, HIDDEN), np.float32)}
    for kind in "qkvo":
        weights[kind] = values.standard_normal((HIDDEN, HIDDEN), np.float32) / HIDDEN**0.5
    weights |= {"scale": np.ones(HIDDEN, np.float32), "shift": np.zeros(HIDDEN, np.float32)}
    text = f"""
    <ir_version: 8, opset_import: ["": 17]>
    encoder (int64[2, {WORDS}] words, float[2, {WORDS}] mask) => (float[2, {HIDDEN}] sentence) {{
      ones = Constant <value = int64[1] {{1}}> ()
      lasts = Constant <value = int64[1] {{2}}> ()
      one = Constant <value = float {{1}}> ()
      far = Constant <value = float {{-10000}}> ()
      hidden = Gather (table, words)
      queries = MatMul (hidden, q)
      keys = MatMul (hidden, k)
      values = MatMul (hidden, v)
      turned = Transpose <perm = [0, 2, 1]> (keys)
      scores = MatMul (queries, turned)
      absent = Sub (one, mask)
      lowered = Mul (absent, far)
      lowered_3d = Unsqueeze (lowered, ones)
      masked = Add (scores, lowered_3d)
      shares = Softmax <axis = -1> (masked)
      mixed = MatMul (shares, values)
      attended = MatMul (mixed, o)
      added = Add (hidden, attended)
      normed = LayerNormalization <axis = -1> (added, scale, shift)
      mask_3d = Unsqueeze (mask, lasts)
      kept = Mul (normed, mask_3d)
      total = ReduceSum <keepdims = 0> (kept, ones)
      count = ReduceSum <keepdims = 1> (mask, ones)
      sentence = Div (total, count)
    }}"""
    model = _with_weights(onnx.parser.parse_model(text), weights)
    rng = random.Random(name)
    executions = []
    for _ in range(MOST):
        lens = [rng.randint(1, WORDS) for _ in range(2)]
        ids = [[int(VOCAB * rng.random() ** 4) for _ in range(WORDS)] for _ in range(2)]
        mask = (np.arange(WORDS) < np.array(lens)[:, None]).astype(np.float32)
        words = np.where(mask > 0, np.array(ids, np.int64), 0)
        given = {"words": words, "mask": mask}
        executions.append(Execution(given, {"sentence": (2, HIDDEN)}))
    seen: dict[int, int] = {}
    for number, execution in enumerate(executions):
        for word in execution.given["words"][execution.given["mask"] > 0]:
            seen.setdefault(int(word), number)
    rare = max(seen, key=lambda word: seen[word])
    return _stateless(name, model, (), executions, Change("table", (rare, 0), "float32"))


def classifier(name: str) -> Recorded:
    """A CNN of three channels, whose last one is black in the earlier pictures."""
    values = np.random.default_rng(2)
    weights = {
        "conv1": values.standard_normal((4, 3, 3, 3), np.float32) / 5,
        "conv2": values.standard_normal((8, 4, 3, 3), np.float32) / 6,
        "fc": values.standard_normal((8, CLASSES), np.float32),
        "bias": values.standard_normal(CLASSES, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["picture", "conv1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p1", "conv2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc", "bias"], ["scores"]),
    ]
    given = [helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, SIDE, SIDE])]
    made = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, CLASSES])]
    graph = helper.make_graph(nodes, "cnn", given, made)
    opset = [helper.make_opsetid("", 17)]
    model = _with_weights(helper.make_model(graph, opset_imports=opset, ir_version=8), weights)
    pictures = np.random.default_rng(3).standard_normal((MOST, 1, 3, SIDE, SIDE), np.float32)
    pictures[: MOST * 2 // 5, :, 2] = 0
    executions = [Execution({"picture": p}, {"scores": (1, CLASSES)}) for p in pictures]
    flags = ("-convert-to-fp16",)
    return _stateless(name, model, flags, executions, Change("conv1", (0, 2, 1, 1), "float16"))


def _with_weights(model: Any, weights: dict[str, Any]) -> Any:
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return model


def _stateless(
    name: str,
    model: Any,
    flags: tuple[str, ...],
    executions: list[Execution],
    change: Change,
) -> Recorded:
    return Recorded(
        name=name,
        model=model,
        flags=flags,
        executions=executions,
        changes=(change,),
        between=lambda first, second: _by_onnxruntime(executions, first, second),
    )


def _by_onnxruntime(executions: list[Execution], first: Any, second: Any) -> Where | None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    pair = [
        onnxruntime.InferenceSession(model.SerializeToString(), options)
        for model in (first, second)
    ]
    for number, execution in enumerate(executions):
        for name in execution.wanted:
            made = [session.run([name], execution.given)[0] for session in pair]
            apart = np.abs(made[0] - made[1])
            if apart.any():
                return Where(number, name, apart)
    return None


def rounded(model: Any, flags: tuple[str, ...]) -> Any:
    """The model with the weights that the documentation of the compiler's flags promises."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in copy.graph.initializer:
        array = np.array(numpy_helper.to_array(tensor))
        if array.dtype == np.float32 and flags and np.isfinite(array).all():
            is_matmul = "-mxfp6-matmul" in flags and (
                tensor.name[0] == "w" or tensor.name == "lm_head"
            )
            half = array.astype(np.float16).astype(np.float32)
            array = mxfp6.quantize(array) if is_matmul else half
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


PROGRAMS: dict[str, Callable[[str], Recorded]] = {
    "continuous batching": lambda name: decoder(name, TinyLlama(), "-convert-to-fp16"),
    "speculative target": lambda name: decoder(
        name, TinyLlama(seed=1), "-convert-to-fp16", drafted=DRAFTED
    ),
    "mxfp6 weights, mxint8 cache": lambda name: decoder(
        *(name, TinyLlama(hidden=64, num_heads=2, num_kv_heads=1)),
        *("-convert-to-fp16", "-mxfp6-matmul"),
        kv="mxint8",
    ),
    "sentence encoder": encoder,
    "classifier of pictures": classifier,
}
"""Each made anew by its name, which is the seed of its executions too."""
