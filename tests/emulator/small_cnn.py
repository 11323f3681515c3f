"""A small CNN, trained here, and its program: what int8 is measured on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qaic_ray.emulator import compiler
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram

CLASSES, SIDE, BATCH = 10, 12, 500
NUM_WEIGHTS = 3 * 16 * 9 + 16 * 32 * 9 + 32 * 36 * CLASSES
SHAPE = f"-onnx-define-symbol=batch,{BATCH}"
PER_CHANNEL = ("-enable-channelwise", "-enable-rowwise")


class Cnn(NamedTuple):
    """A trained classifier, images that it never saw, and images to calibrate with.

    Attributes:
        logits: what torch makes of the images, in float32.
    """

    net: nn.Sequential
    images: Any
    labels: Any
    seen: Any
    logits: Any


@cache
def trained() -> Cnn:
    """The same network each time: noisy copies of ten random images, and which one each is of.

    A process trains it once, and nobody changes what it is given.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as quick, and the machine is others' too
    with torch.random.fork_rng():
        torch.manual_seed(3)
        templates = torch.randn(CLASSES, 3, SIDE, SIDE)

        def draw(number: int) -> tuple[Any, Any]:
            labels = torch.randint(0, CLASSES, (number,))
            return templates[labels] + 3.3 * torch.randn(number, 3, SIDE, SIDE), labels

        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 36, CLASSES),
        )
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(100):
            images, labels = draw(64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        images, labels = draw(2000)
        seen, _ = draw(BATCH)
    with torch.no_grad():
        logits = net.eval()(images)
    torch.set_num_threads(threads)
    return Cnn(net, images.numpy(), labels.numpy(), seen.numpy(), logits.numpy())


def write(net: nn.Sequential, folder: Path, *, kind: int = TensorProto.FLOAT) -> None:
    """The network as `cnn.onnx`, each operator and weight torch's own, in an ONNX type."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = {name.replace(".", "_"): p.detach().numpy() for name, p in net.named_parameters()}
    pads = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        helper.make_node("Conv", ["image", "0_weight", "0_bias"], ["c0"], name="conv0", **pads),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "3_weight", "3_bias"], ["c1"], name="conv1", **pads),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Flatten", ["r1"], ["f"]),
        helper.make_node("Gemm", ["f", "6_weight", "6_bias"], ["logits"], transB=1),
    ]
    image = helper.make_tensor_value_info("image", kind, ["batch", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", kind, ["batch", CLASSES])
    tensors = [numpy_helper.from_array(a.astype(dtype), name) for name, a in weights.items()]
    save(helper.make_graph(nodes, "cnn", [image], [logits], tensors), folder / "cnn.onnx")


def save(graph: Any, path: Path) -> None:
    """A graph as a model that the checker takes."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def compiled(folder: Path, name: str, *flags: str) -> tuple[CompiledProgram, dict[str, Any]]:
    """The program of `name`.onnx with these flags, and its report."""
    target = folder / f"qpc-{len(list(folder.iterdir()))}"
    argv = [f"-m={folder / name}.onnx", "-aic-hw", "-compile-only", f"-aic-binary-dir={target}"]
    assert compiler.main([*argv, *flags]) == 0
    report = json.loads((target / "compile-report.json").read_text())
    return CompiledProgram.open(str(target)), report


def logits_of(program: CompiledProgram, images: Any) -> Any:
    """What a program of the network makes of images, batch by batch."""
    activation = LoadedProgram(program, 2).activate()
    parts = np.split(images, len(images) // BATCH)
    wanted = {"logits": (BATCH, CLASSES)}
    return np.concatenate([activation.run({"image": x}, wanted)["logits"] for x in parts])


def write_list(folder: Path, images: Any) -> str:
    """Images as the compiler's list of inputs; the option that names it."""
    path = folder / "image.raw"
    images.tofile(path)
    (folder / "list.txt").write_text(f"{path}\n")
    return f"-input-list-file={folder / 'list.txt'}"


def accuracy(logits: Any, labels: Any) -> float:
    """The share of images whose largest logit is that of their class."""
    return float((logits.argmax(1) == labels).mean())


def relative_error(made: Any, truth: Any) -> float:
    """The norm of the difference beside that of the truth."""
    return float(np.linalg.norm(made - truth) / np.linalg.norm(truth))
