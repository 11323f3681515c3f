"""The whole road through an installed folder: its compiler, then its runtime in a program that
knows nothing of qaic_ray, against the same model in numpy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compiled import PROMPT_LEN, SLOTS, write_inputs
from tiny_llama import NumpyLlama, TinyLlama

from qaic_ray.emulator import folder

# QEfficient's order of calls: chunked prefill, then decode, the state staying on the card.
PROGRAM = """
import platform, sys
import numpy as np
root, qpc_path, prompts_path, out_path = sys.argv[1:]
sys.path.append(f"{root}/dev/lib/{platform.machine()}")
import qaicrt
sys.path.append(f"{root}/dev/python")
import QAicApi_pb2 as aicapi

types = {aicapi.FLOAT_TYPE: np.float32, aicapi.FLOAT_16_TYPE: np.float16,
         aicapi.INT64_I_TYPE: np.int64}
context = qaicrt.Context(qaicrt.QIDList([3]))
queue = qaicrt.Queue(context, 3)
qpc = qaicrt.Qpc(qpc_path)
status, data = qpc.getIoDescriptor()
desc = aicapi.IoDesc()
desc.ParseFromString(bytes(data))
bindings = desc.selected_set.bindings
index = {b.name: b.index for b in bindings}
properties = qaicrt.QAicProgramProperties()
properties.SubmitRetryTimeoutMs = 60_000
program = qaicrt.Program(context, 3, qpc, properties)
assert program.load() == qaicrt.QStatus.QS_SUCCESS
program.activate()
execObj = qaicrt.ExecObj(context, program)
buffers = [qaicrt.QBuffer(bytes(b.size)) for b in bindings]
dims = qaicrt.BufferDimensionsVecRef(
    [(np.dtype(types[b.type]).itemsize, list(b.dims)) for b in bindings])

def put(arrays):
    for name, array in arrays.items():
        buffers[index[name]] = qaicrt.QBuffer(array.tobytes())
        dims[index[name]] = (array.itemsize, array.shape)

def run(ids, positions):
    put({"input_ids": ids, "position_ids": positions})
    assert execObj.setData(buffers, dims) == qaicrt.QStatus.QS_SUCCESS
    assert queue.enqueue(execObj) == qaicrt.QStatus.QS_SUCCESS
    assert execObj.waitForCompletion() == qaicrt.QStatus.QS_SUCCESS
    status, out = execObj.getData()
    raw = np.frombuffer(bytes(out[index["logits"]]), np.float32)
    return raw.reshape(dims[index["logits"]][1])[:, 0]

put({n: np.array([]) for n in index if n.startswith("past_")})
prompts = np.load(prompts_path)
rows, length = prompts.shape
chunk = max(s.shapes[index["input_ids"]].dims[1] for s in desc.allowed_shapes)
vocab = desc.allowed_shapes[0].shapes[index["logits"]].dims[2]
put({"logits": np.zeros((rows, 1, vocab), np.float32)})
seen = []
for start in range(0, length, chunk):
    positions = np.broadcast_to(np.arange(start, start + chunk), (rows, chunk))
    logits = run(prompts[:, start : start + chunk], np.ascontiguousarray(positions))
seen.append(logits)
for position in range(length, length + 5):
    ids = seen[-1].argmax(axis=1)[:, None]
    seen.append(run(ids, np.full((rows, 1), position)))
np.save(out_path, np.stack(seen))
del execObj
assert program.deactivate() == qaicrt.QStatus.QS_SUCCESS
assert qaicrt.Util().getResourceInfo(3)[1].nspFree == 14
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What a user's shell has, and cards of this test's own."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return {**kept, folder.STATE_VARIABLE: str(tmp_path / "state"), "OMP_NUM_THREADS": "1"}


def call(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_compile_and_run_without_qaic_ray(
    sdk: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    llama = TinyLlama(continuous=False)
    argv = write_inputs(tmp_path / "model", llama)
    compiled = call([str(sdk / "exec" / "qaic-exec"), *argv], environment)
    assert compiled.returncode == 0, compiled.stderr
    qpc = tmp_path / "model" / "qpc"
    validated = call(
        [str(sdk / "tools/qaic-qpc"), "validate", "-i", str(qpc / "programqpc.bin")], environment
    )
    assert "Number of NSP required: 14\n" in validated.stdout

    prompts = np.random.default_rng(0).integers(0, llama.vocab, (SLOTS, 2 * PROMPT_LEN))
    np.save(tmp_path / "prompts.npy", prompts)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    files = [str(qpc), str(tmp_path / "prompts.npy"), str(tmp_path / "logits.npy")]
    result = call([sys.executable, str(script), str(sdk), *files], environment)
    assert result.returncode == 0, result.stderr

    truth = NumpyLlama(llama, llama.weights)
    found = np.load(tmp_path / "logits.npy")
    for row, prompt in enumerate(prompts):
        tokens = prompt.tolist()
        for position, token in enumerate(tokens):
            expected = truth.forward(row, token, position)
        for step, logits in enumerate(found[:, row]):
            np.testing.assert_allclose(logits, expected, atol=1e-4)
            expected = truth.forward(row, int(logits.argmax()), len(tokens) + step)
