"""Runs a tiny program with a known answer on a card: finds what no tool of the SDK tells.

The program has the interface of a language model and numbers that are exact in float16. It is
compiled by the SDK's own compiler, and runs in a process of its own for each card: a card that
hangs, or kills its process, is found too.

    python -m qaic_ray.doctor.card_trial SDK_FOLDER QPC_FOLDER QID     one JSON object on stdout
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qaic_ray import contract
from qaic_ray.cards.lease import CardLocks, card_scope
from qaic_ray.compile.compiler import check_qpc, run_compiler
from qaic_ray.contract import Specializations
from qaic_ray.doctor.facts import CardTrial, quickest_and_slow
from qaic_ray.engine.session import Session
from qaic_ray.errors import DeviceBusy, DeviceError, QaicRayError
from qaic_ray.sdk import Sdk, open_sdk
from qaic_ray.timeouts import DEFAULT_TIMEOUTS

VOCAB = 8
WIDTH = 4
CONTEXT = 32
EXECUTIONS = 16
TRIAL_S = 90.0
"""Longer than the runtime waits for an execution, so that its own error is heard first."""

_AGAIN = "QS_AGAIN"

Numbers = npt.NDArray[np.float32]

_SHAPES = Specializations.build(batch_size=1, prompt_len=[1], ctx_len=CONTEXT, continuous=False)


def try_cards(
    sdk: Sdk, qids: Iterable[int], folder: Path, timeout_s: float | None = None
) -> list[CardTrial]:
    """Run the program on cards, all at once; each is locked meanwhile, or left out if it is held.

    Args:
        sdk: theirs.
        qids: the cards.
        folder: empty; gets the program.
        timeout_s: after which a card is said to hang; None for TRIAL_S.

    Raises:
        CompileError: the program cannot be compiled.
    """
    qpc = compile_program(sdk, folder)
    chosen, limit_s = list(qids), TRIAL_S if timeout_s is None else timeout_s
    with ThreadPoolExecutor(max_workers=max(1, len(chosen))) as pool:
        trials = list(pool.map(lambda qid: _try_card(sdk, qpc, qid, limit_s), chosen))
    # What is slow beside others may only have had too little of the host: once more, alone.
    again = {t.qid: _try_card(sdk, qpc, t.qid, limit_s) for t in quickest_and_slow(trials)[1]}
    return [again.get(trial.qid, trial) for trial in trials]


def compile_program(sdk: Sdk, folder: Path) -> Path:
    """Compile the program; the folder of its QPC."""
    onnx_file, shapes, qpc = folder / "trial.onnx", folder / "shapes.json", folder / "qpc"
    write_model(onnx_file)
    shapes.write_text(_SHAPES.to_json(named=sdk.named_specializations), encoding="utf-8")
    argv = [str(sdk.compiler), "-aic-hw", f"-aic-hw-version={sdk.hw_version}", f"-m={onnx_file}"]
    argv += ["-compile-only"] if sdk.compile_only else []
    argv += ["-retained-state", "-convert-to-fp16", "-aic-num-cores=1"]
    argv += [f"-network-specialization-config={shapes}", f"-aic-binary-dir={qpc}"]
    log = folder / "compile.log"
    run_compiler(argv, log)
    check_qpc(qpc, log)
    return qpc


def write_model(path: Path) -> None:
    """Logits are a row of a table by the token, and half the position more."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    past = [contract.past_key(0), contract.past_value(0)]
    cache, int64, float32 = [1, 1, "ctx_len", WIDTH], TensorProto.INT64, TensorProto.FLOAT
    info = helper.make_tensor_value_info
    ids = [info(name, int64, ["batch_size", "seq_len"]) for name in _INPUTS]
    inputs = [*ids, *(info(name, float32, cache) for name in past)]
    outputs = [info(contract.LOGITS, float32, ["batch_size", "seq_len", VOCAB])]
    outputs += [info(contract.retained(name), float32, cache) for name in past]
    constants = {"table": _table(), "weights": _weights()}
    constants |= {"half": np.array([0.5], np.float32), "none": np.array([0], np.float32)}
    nodes = [
        helper.make_node("Gather", ["table", contract.INPUT_IDS], ["row"]),
        helper.make_node("MatMul", ["row", "weights"], ["product"]),
        helper.make_node("Cast", [contract.POSITION_IDS], ["position"], to=float32),
        helper.make_node("Unsqueeze", ["position", "last"], ["place"]),
        helper.make_node("Mul", ["place", "half"], ["more"]),
        helper.make_node("Add", ["product", "more"], [contract.LOGITS]),
        *(helper.make_node("Add", [name, "none"], [contract.retained(name)]) for name in past),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    initializers.append(numpy_helper.from_array(np.array([-1], np.int64), "last"))
    graph = helper.make_graph(nodes, "trial", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=7), str(path))


_INPUTS = (contract.INPUT_IDS, contract.POSITION_IDS)


def _table() -> Numbers:
    return np.arange(VOCAB * WIDTH, dtype=np.float32).reshape(VOCAB, WIDTH) % 7 - 3


def _weights() -> Numbers:
    return np.arange(WIDTH * VOCAB, dtype=np.float32).reshape(WIDTH, VOCAB) % 5 - 2


def expected(token: int, position: int) -> Numbers:
    """The logits, [1, 1, VOCAB]."""
    logits: Numbers = _table()[token] @ _weights() + np.float32(0.5 * position)
    return logits.reshape(1, 1, VOCAB)


def _try_card(sdk: Sdk, qpc: Path, qid: int, timeout_s: float) -> CardTrial:
    locks = CardLocks([qid], scope=card_scope(sdk), what="doctor")
    try:
        locks.acquire()
    except DeviceBusy as error:
        return CardTrial(qid, "busy", str(error))
    except DeviceError as error:
        return CardTrial(qid, "refused", str(error))
    try:
        return _in_a_child(sdk, qpc, qid, timeout_s)
    finally:
        locks.release()


def _in_a_child(sdk: Sdk, qpc: Path, qid: int, timeout_s: float) -> CardTrial:
    argv = [sys.executable, "-m", "qaic_ray.doctor.card_trial", str(sdk.root), str(qpc), str(qid)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return CardTrial(qid, "hung", f"It did not answer within {timeout_s:.0f} s.")
    try:
        return CardTrial(**json.loads(done.stdout.rstrip().rpartition("\n")[2]))
    except (ValueError, TypeError):
        words = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        return CardTrial(qid, "died", f"Its process ended with {done.returncode}: {words[0][:200]}")


def run_program(sdk: Sdk, qpc: Path, qid: int) -> CardTrial:
    """Run the program in this process; what the card asks to have tried again is tried again."""
    for pause_s in (*DEFAULT_TIMEOUTS.again_s, None):
        try:
            return _run_once(sdk, qpc, qid)
        except QaicRayError as error:
            is_again = isinstance(error, DeviceError) and error.status == _AGAIN
            if not is_again or pause_s is None:
                return CardTrial(qid, "refused", str(error))
            time.sleep(pause_s)
    raise AssertionError("the last pause is None")


def _run_once(sdk: Sdk, qpc: Path, qid: int) -> CardTrial:
    began_s = time.monotonic()
    session = Session(sdk, qpc, [qid])
    open_s, times_s = time.monotonic() - began_s, []
    try:
        for number in range(EXECUTIONS):
            token, began_s = number % VOCAB, time.monotonic()
            inputs = dict(zip(_INPUTS, np.array([[[token]], [[number]]], np.int64), strict=True))
            logits = session.run(session.specializations.decode, inputs)
            times_s.append(time.monotonic() - began_s)
            if not np.array_equal(np.asarray(logits, np.float32), expected(token, number)):
                says = f"Execution {number + 1} of {EXECUTIONS} gave a wrong answer."
                return CardTrial(qid, "wrong", says)
    finally:
        session.close()
    return CardTrial(qid, "right", open_s=open_s, run_s=min(times_s))


def main(argv: list[str]) -> int:
    """The child; see the module."""
    root, qpc, qid = argv
    trial = run_program(open_sdk(Path(root)), Path(qpc), int(qid))
    sys.stdout.write("\n" + json.dumps(asdict(trial)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
