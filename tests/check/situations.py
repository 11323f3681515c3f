"""What public issues and documents tell of: each situation as an artifact, and what is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from made_artifacts import (
    COMMAND,
    DECODE,
    FLOAT16,
    HIDDEN,
    PREFILL,
    SHAPES,
    WIDTH,
    Maker,
    cut,
    decoder,
    external,
    folder_of,
    huge_model,
    info,
    io_list,
    large_program,
    mdp,
    model,
    named,
    partition,
    program,
    qefficient,
    script,
    shapes,
    tensor,
    text_file,
    weight,
    weight_free,
    with_hole,
)
from onnx import TensorProto, helper

node = helper.make_node


class Situation(NamedTuple):
    """What is made, what is found of it, and for which SDK and card."""

    make: Maker
    rules: tuple[str, ...]
    apps: str = "1.22"
    sku: str = "standard"
    says: str = ""
    """A part of what is said."""


def situation(make: Maker, *rules: str, **how: str) -> Situation:
    return Situation(make, rules, **how)


def _without(flag: str) -> tuple[str, ...]:
    return tuple(word for word in COMMAND if not word.startswith(flag))


def _with(*words: str) -> tuple[str, ...]:
    names = [word.partition("=")[0] for word in words]
    return (*(w for w in COMMAND if w.partition("=")[0] not in names), *words)


def _change(entry: dict[str, str], **values: object) -> dict[str, object]:
    return {**entry, **values}


def _ccl(*lens: int) -> list[dict[str, str]]:
    return [
        entry | {"comp_ctx_lengths": str(size)}
        for entry, size in zip((PREFILL, *(DECODE for _ in lens[1:])), lens, strict=True)
    ]


def _without_custom_io(folder: Path) -> Path:
    qefficient()(folder)
    for path in folder.rglob("custom_io.yaml"):
        path.unlink()
    return folder


def _broken(change: Callable[[bytes], bytes]) -> Maker:
    def make(folder: Path) -> Path:
        path = program(folder)
        path.write_bytes(change(path.read_bytes()))
        return folder

    return make


SLOTS = [e | {"full_batch_size": "4"} for e in (PREFILL, DECODE | {"batch_size": "4"})]
GATHERED = [
    node("ReduceSum", ["input_ids"], ["one_id"], keepdims=0),
    node("Gather", ["experts", "one_id"], ["expert"], axis=0, name="choose"),
    node("MatMul", ["logits", "expert"], ["mixed"], name="mix"),
]
MORE = [info("mixed", ["batch_size", "seq_len", HIDDEN])]
SEVEN_B = 6_738_415_616 // HIDDEN * HIDDEN
SEVENTY_B = 70_553_706_496 // HIDDEN * HIDDEN
THIRTEEN_B = 13_015_864_320 // HIDDEN * HIDDEN
ALMOST = 7_555_000_000 // HIDDEN * HIDDEN
"""Weights whose 2 bytes, with a prefill's products of 8 rows, leave 100 MB of a Standard card."""
IDS = ["batch_size", "seq_len"]

SHAPE_FILES = {
    "named for an SDK before 1.22": situation(
        shapes(*named(*SHAPES)),
        "specializations-named",
        apps="1.21.6",
        says="must be string, but is object",
    ),
    "named by graph_name for an old SDK": situation(
        shapes(*({"name": "Decode", "symbols": DECODE},)), "specializations-named", apps="1.14.2"
    ),
    "numbers in place of strings": situation(
        shapes(_change(PREFILL, seq_len=8), DECODE), "specializations-numbers", says="'seq_len'"
    ),
    "not JSON": situation(text_file("specializations.json", "{"), "specializations-unreadable"),
    "no list": situation(
        text_file("specializations.json", '{"specializations": {}}'), "specializations-unreadable"
    ),
    "an entry is no object": situation(shapes("prefill"), "specializations-unreadable"),
    "a size of zero": situation(
        shapes(PREFILL, _change(DECODE, batch_size="0")), "specializations-size"
    ),
    "a size that is a word": situation(
        shapes(PREFILL, _change(DECODE, ctx_len="long")), "specializations-size"
    ),
    "the recipe's other names": situation(
        shapes({"batch_size": "1", "prompt_length": "8", "ctx_len": "64"}, DECODE),
        "specializations-keys",
        says="seq_len",
    ),
    "slots in one entry only": situation(
        shapes(PREFILL | {"full_batch_size": "4"}, DECODE), "specializations-differ"
    ),
    "two contexts": situation(
        shapes(PREFILL, DECODE | {"ctx_len": "128"}), "specializations-context"
    ),
    "two equal entries": situation(shapes(PREFILL, DECODE, DECODE), "specializations-equal"),
    "a prompt longer than the context": situation(
        shapes(PREFILL | {"seq_len": "128"}, DECODE), "prompt-length"
    ),
    "a prompt that is no power of two": situation(
        shapes(PREFILL | {"seq_len": "48"}, DECODE), "prompt-length-odd", says="64 or 32"
    ),
    "more rows than slots": situation(shapes(SLOTS[0], SLOTS[1] | {"batch_size": "8"}), "slots"),
    "one compute context for prefill and decode": situation(
        shapes(*_ccl(64, 32, 64)), "compute-context", says="Give the prefill one"
    ),
    "a compute context beyond the context": situation(
        shapes(*_ccl(32, 128)), "compute-context", says="128"
    ),
    "no decode entry reaches the context": situation(
        shapes(*_ccl(64, 32)), "compute-context-short", says="32"
    ),
}
"""Situations of specializations.json alone."""

CONFIGS = {
    "a line that is none": situation(
        text_file("custom_io.yaml", "IOName past_key.0\n"), "custom-io-unreadable"
    ),
    "a precision that is none": situation(
        text_file("custom_io.yaml", io_list(dict.fromkeys(FLOAT16, "bfloat8"))),
        "custom-io-precision",
    ),
    "half of a state": situation(
        text_file("custom_io.yaml", io_list({"past_key.0": "float16"})), "custom-io-half"
    ),
    "two precisions of a state": situation(
        folder_of(precisions=FLOAT16 | {"past_key.0": "mxint8"}), "custom-io-half"
    ),
    "a name that the graph has not": situation(
        folder_of(precisions=FLOAT16 | {"past_key.9": "float16"}), "custom-io-name"
    ),
    "a precision of ids": situation(
        folder_of(precisions=FLOAT16 | {"input_ids": "float16"}), "custom-io-integer"
    ),
    "mxint8 of 24 numbers": situation(
        folder_of(
            decoder(past=["batch_size", 2, "ctx_len", 24]),
            precisions=dict.fromkeys(FLOAT16, "mxint8"),
        ),
        "mxint8-width",
        says="24",
    ),
    "MDP that is not JSON": situation(text_file("mdp_ts_2.json", "["), "mdp-unreadable"),
    "MDP without devices": situation(
        text_file("mdp_ts_2.json", '{"partitions": [{"name": "P"}]}'), "mdp-unreadable"
    ),
    "MDP with QIDs": situation(mdp([(4, 14), (5, 14)]), "mdp-ids", says="4, 5"),
    "MDP for 16 cores on Standard cards": situation(
        mdp([(0, 16), (1, 16)]), "mdp-cores", says="16 cores, and a Standard SoC 14"
    ),
    "MDP with unlike devices": situation(mdp([(0, 14), (1, 7)]), "mdp-uneven"),
    "MDP without connections": situation(
        mdp([(0, 14), (1, 14)], connections=()), "mdp-through-host"
    ),
    "MDP that connects a stranger": situation(
        mdp([(0, 14), (1, 14)], connections=[[0, 1, 2]]), "mdp-connection"
    ),
}
"""Situations of the compiler's other files."""

GRAPHS = {
    "an ONNX file that is none": situation(text_file("model.onnx", "onnx"), "onnx-unreadable"),
    "weights that are not there": situation(
        external(lambda path: path.unlink()), "weights-missing", says="weights.bin"
    ),
    "weights elsewhere": situation(
        external(lambda _: None, location="../weights.bin"), "weights-missing"
    ),
    "weights that are cut": situation(external(cut), "weights-short", says="1000 bytes"),
    "an operator that nobody knows": situation(
        model(node("FlashAttention", ["logits"], ["x"], name="fa")),
        "operator",
        says="FlashAttention",
    ),
    "an operator of another vendor": situation(
        model(node("Rope", ["logits"], ["x"], domain="acme.ops")), "operator", says="acme.ops::Rope"
    ),
    "einsum": situation(
        model(node("Einsum", ["logits", "w"], ["x"], equation="bsh,hk->bsk")), "einsum"
    ),
    "a double for a buffer": situation(
        model(
            node("Cast", ["logits"], ["x"], to=TensorProto.DOUBLE),
            outputs=[info("x", [*IDS, HIDDEN], TensorProto.DOUBLE)],
        ),
        "io-type",
        says="DOUBLE",
    ),
    "an input that is an output": situation(
        model(outputs=[info("input_ids", IDS, TensorProto.INT64)]),
        "io-names",
        says="'input_ids' is an input and an output",
    ),
    "two outputs of one name": situation(
        model(node("Identity", ["logits"], ["x"]), outputs=[info("x", [1]), info("x", [1])]),
        "io-names",
        says="two outputs 'x'",
    ),
    "an output of no operator": situation(
        model(outputs=[info("x", [1])]), "io-names", says="the output 'x'"
    ),
    "a range from run time": situation(
        model(
            node("ReduceMax", ["input_ids"], ["start"], keepdims=0),
            node("Range", ["start", "end", "step"], ["x"], name="/Range_1"),
            tensors=[tensor("end", 100, np.int64), tensor("step", 1, np.int64)],
        ),
        "range",
        says="Non-constant start",
    ),
    "repeats from run time": situation(
        model(
            node("ReduceMax", ["input_ids"], ["most"], axes=[0, 1], keepdims=0),
            node("Unsqueeze", ["most", "axis"], ["repeats"]),
            node("Tile", ["flat", "repeats"], ["x"], name="repeat"),
            tensors=[tensor("axis", [0], np.int64), tensor("flat", [1.0, 2.0])],
        ),
        "shape-at-run-time",
        says="'repeats'",
    ),
    "uneven ScatterND": situation(
        model(
            node("ScatterND", ["table", "places", "news"], ["x"], name="/ScatterND"),
            tensors=[
                weight("table", 8, 4),
                tensor("places", [[0], [1], [2]], np.int64),
                weight("news", 2, 4),
            ],
        ),
        "scatter",
        says="Indices and updates must have same lengths",
    ),
    "shapes that do not broadcast": situation(
        model(
            node("Where", ["mask", "a", "b"], ["x"], name="Where_195/"),
            tensors=[tensor("mask", [True, False], np.bool_), weight("a", 3), weight("b", 1)],
        ),
        "broadcast",
        says="Where_195/",
    ),
    "a reshape to another size": situation(
        model(
            node("Reshape", ["a", "dims"], ["x"], name="view"),
            tensors=[weight("a", 6), tensor("dims", [4, 2], np.int64)],
        ),
        "reshape",
        says="8 elements",
    ),
    "a mask of the smallest float32": situation(
        model(
            node("Add", ["logits", "mask"], ["x"]),
            tensors=[tensor("mask", np.finfo(np.float32).min)],
        ),
        "fp16-range",
        says="'mask'",
    ),
    "cards' operators for Apps 1.14": situation(
        model(
            node(
                "CtxScatter",
                ["past_key.0", "input_ids", "past_key.0"],
                ["x"],
                domain="com.qualcomm.cloud",
            )
        ),
        "contract",
        apps="1.14.2",
        says="CtxScatter",
    ),
    "states for Apps 1.10": situation(model(), "retained-state", apps="1.10"),
    "a cache that is no state": situation(model(suffix="_out"), "state-alone"),
    "a state of two types": situation(
        model(
            *(
                node("Cast", [name], [f"{name}_RetainedState"], to=TensorProto.FLOAT16)
                for name in ("past_key.0", "past_value.0")
            ),
            suffix="_out",
            outputs=[
                info(
                    f"{name}_RetainedState",
                    ["batch_size", 2, "ctx_len", WIDTH],
                    TensorProto.FLOAT16,
                )
                for name in ("past_key.0", "past_value.0")
            ],
        ),
        "state-unlike",
        says="FLOAT16",
    ),
    "subfunctions' names left": situation(
        model(suffix="_InternalRetainedState"), "state-renamed", "state-alone"
    ),
    "a weight that is no constant": situation(
        model(
            node("MatMul", ["logits", "v"], ["mixed"], name="free"),
            inputs=[info("v", [HIDDEN, HIDDEN])],
            outputs=MORE,
        ),
        "mxfp6-not-constant",
        says="v is an input",
    ),
    "a weight behind a cast": situation(
        model(
            node("Cast", ["half"], ["whole"], to=TensorProto.FLOAT),
            node("MatMul", ["logits", "whole"], ["mixed"], name="cast"),
            tensors=[tensor("half", np.ones((HIDDEN, HIDDEN)), np.float16)],
            outputs=MORE,
        ),
        "mxfp6-hidden",
        says="Cast",
    ),
    "a weight that is dequantized": situation(
        model(
            node("DequantizeLinear", ["small", "scale"], ["whole"]),
            node("Transpose", ["whole"], ["turned"]),
            node("MatMul", ["logits", "turned"], ["mixed"], name="int8"),
            tensors=[
                tensor("small", np.ones((HIDDEN, HIDDEN)), np.int8),
                tensor("scale", 0.1),
            ],
            outputs=MORE,
        ),
        "mxfp6-hidden",
        says="DequantizeLinear",
    ),
    "experts that are gathered": situation(
        model(*GATHERED, tensors=[weight("experts", 4, HIDDEN, HIDDEN)], outputs=MORE),
        "mxfp6-gathered",
        says="experts",
    ),
    "Gemm": situation(
        model(
            node("Reshape", ["logits", "rows"], ["flat"]),
            node("Gemm", ["flat", "v"], ["mixed"], name="fc"),
            tensors=[tensor("rows", [-1, HIDDEN], np.int64), weight("v", HIDDEN, HIDDEN)],
            outputs=[info("mixed", ["rows", HIDDEN])],
        ),
        "mxfp6-gemm",
    ),
    "a checkpoint without the tensor": situation(weight_free(key="gone"), "extdata", says="'gone'"),
    "a checkpoint of another shape": situation(
        weight_free(shape=(HIDDEN, 32)), "extdata", says="32"
    ),
    "a checkpoint that is not there": situation(
        weight_free(files=["elsewhere/model.safetensors"]), "extdata", says="elsewhere"
    ),
    "weights in files for Apps 1.20": situation(
        weight_free(), "extdata-sdk", apps="1.20", says="v for one"
    ),
    "metadata of another version": situation(weight_free(version=99), "extdata", says="99"),
    "metadata that names no input": situation(
        weight_free(inputs=[{"name": "u", "location": {"file": 0, "key": "lm.weight"}}]),
        "extdata",
        "mxfp6-not-constant",
        says="'u'",
    ),
}
"""Situations of ONNX files."""

FOLDERS = {
    "a symbol without a value": situation(
        folder_of(decoder(past=["batch_size", 2, "cache_len", WIDTH])),
        "symbols",
        says="'cache_len'",
    ),
    "a cache of another length": situation(
        folder_of(decoder(past=["batch_size", 2, 32, WIDTH])), "cache-fixed", says="32 positions"
    ),
    "13B in fp16 on Standard cards": situation(
        with_hole(qefficient(_without("-mxfp6"), graph=huge_model(THIRTEEN_B)), 4 * THIRTEEN_B),
        "dram",
        "mxfp6-missing",
        says="Compile with -mxfp6-matmul",
    ),
    "70B in MXFP6 on one Ultra SoC": situation(
        with_hole(
            qefficient(_with("-aic-num-cores=16"), graph=huge_model(SEVENTY_B), cores=16),
            4 * SEVENTY_B,
        ),
        "dram",
        sku="ultra",
        says="several SoCs",
    ),
    "a cache that fills the card": situation(
        qefficient(
            entries=[
                entry | {"ctx_len": "131072", "batch_size": "600"} for entry in (PREFILL, DECODE)
            ]
        ),
        "dram",
        says="of cache",
    ),
    "7B in fp16, almost all of the card": situation(
        with_hole(
            qefficient(_without("-mxfp6"), graph=huge_model(ALMOST)),
            4 * ALMOST,
        ),
        "dram-tight",
        "mxfp6-missing",
    ),
    "7B without MXFP6": situation(
        with_hole(qefficient(_without("-mxfp6"), graph=huge_model(SEVEN_B)), 4 * SEVEN_B),
        "mxfp6-missing",
        says="12.6 GiB",
    ),
    "16 cores on Standard cards": situation(
        qefficient(_with("-aic-num-cores=16"), cores=16), "cores", says="16 cores"
    ),
    "32 cores on any card": situation(
        qefficient(_with("-aic-num-cores=32"), cores=32), "cores", sku="ultra"
    ),
    "ai100 for an SDK before 1.21": situation(
        qefficient(), "hw-version", apps="1.20", says="knows 2.0"
    ),
    "no fp16": situation(script(*_without("-convert")), "no-fp16"),
    "no retained state": situation(script(*_without("-retained")), "no-retained-state"),
    "qaic-exec that runs what it compiled": situation(
        script("qaic-exec", *COMMAND[1:]), "no-compile-only"
    ),
    "SDP beside depth first": situation(
        script(*COMMAND, "-sdp-cluster-sizes=2", "-aic-enable-depth-first"), "partitions-together"
    ),
    "SDP beside MDP": situation(
        script(*COMMAND, "-sdp-cluster-sizes=2", "-mdp-load-partition-config=mdp.json"),
        "partitions-together",
    ),
    "a script without a compiler": situation(
        text_file("qaic-compile.sh", "echo done\n"), "command-unreadable"
    ),
    "a compile that was stopped": situation(qefficient(with_program=False), "program-missing"),
    "a program without its shapes": situation(qefficient(written=False), "specializations-missing"),
    "fewer rows than slots": situation(
        qefficient(
            graph=decoder(past=["full_batch_size", 2, "ctx_len", WIDTH]),
            entries=[SLOTS[0], SLOTS[1] | {"batch_size": "2"}],
        ),
        "slots-unlike",
    ),
    "more slices than heads": situation(
        qefficient(mdp_file=partition([(n, 14) for n in range(4)])), "mdp-heads", says="2 heads"
    ),
    "a float32 cache": situation(_without_custom_io, "custom-io-wide"),
}
"""Situations of folders."""


PROGRAMS = {
    "a program that is cut": situation(_broken(lambda data: data[:-8]), "program-unreadable"),
    "a program that is none": situation(
        _broken(lambda data: b"ELF." + data[4:]), "program-unreadable"
    ),
    "a program without its network": situation(
        _broken(lambda data: data.replace(b"network.elf", b"network.eel")), "program-parts"
    ),
    "a program of 16 cores": situation(
        lambda folder: program(folder, cores=16),
        "cores",
        says="16 cores, and a Standard SoC has 14",
    ),
    "a program larger than the card": situation(
        lambda folder: large_program(folder, 17 * 2**30), "dram", says="17.0 GiB"
    ),
}
"""Situations of programs."""

ALL = {**SHAPE_FILES, **CONFIGS, **GRAPHS, **FOLDERS, **PROGRAMS}
