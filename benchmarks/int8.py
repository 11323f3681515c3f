"""What int8 costs a small CNN: how many images are right in fp32, and by each way to quantize.

    python benchmarks/int8.py

The network (16,560 weights) is trained here for some seconds, always the same one, by torch. Its
programs are made by the emulated compiler's own command line, with ranges from 500 images that it
was not trained on; 2,000 others are classified. The truth is torch in float32.

Prints a table, and one JSON object as its last line; the exit code is 1 where a way that has real
inputs loses more than a point of accuracy. Nothing here is a speed, and nothing a card's.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).resolve().parents[1] / "tests" / "emulator"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))
import small_cnn  # noqa: E402 - it lies among the tests

FP32, RANDOM = "fp32", "random data"
FLAGS: dict[str, tuple[str, ...]] = {
    "symmetric_with_uint8 (the default)": (),
    "symmetric": ("-quantization-schema=symmetric",),
    "symmetric_with_power2_scale": ("-quantization-schema=symmetric_with_power2_scale",),
    "asymmetric": ("-quantization-schema=asymmetric",),
    "per channel and row": small_cnn.PER_CHANNEL,
    "asymmetric, per channel and row": ("-quantization-schema=asymmetric", *small_cnn.PER_CHANNEL),
    "Percentile, 99.99": (
        "-quantization-calibration=Percentile",
        "-percentile-calibration-value=99.99",
    ),
    "MSE": ("-quantization-calibration=MSE",),
    "KLMinimization": ("-quantization-calibration=KLMinimization",),
    "biases of 8 bits": ("-quantization-precision-bias=Int8",),
}
"""Ways that take ranges from real inputs, by what the table calls them."""

MOST_LOST = 0.01


def main() -> int:
    """Measure, show, and judge."""
    cnn = small_cnn.trained()
    truth = cnn.logits
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_cnn.write(cnn.net, folder)
        listed = ("-convert-to-quantize", small_cnn.write_list(folder, cnn.seen))
        rows[FP32] = _measured(folder, cnn, truth)
        for way, flags in FLAGS.items():
            rows[way] = _measured(folder, cnn, truth, *listed, *flags)
        rows[RANDOM] = _measured(folder, cnn, truth, "-convert-to-quantize")
        small_cnn.write(cnn.net, folder, kind=TensorProto.FLOAT16)
        small_cnn.write_list(folder, cnn.seen.astype(np.float16))
        rows["a float16 model"] = _measured(folder, cnn, truth, *listed)
    _show(rows)
    lost = {way: rows[FP32]["accuracy"] - row["accuracy"] for way, row in rows.items()}
    failed = sorted(way for way, share in lost.items() if share > MOST_LOST and way != RANDOM)
    print(json.dumps({"rows": rows, "failed": failed}))
    return 1 if failed else 0


def _measured(folder: Path, cnn: small_cnn.Cnn, truth: Any, *flags: str) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        program, _ = small_cnn.compiled(folder, "cnn", small_cnn.SHAPE, *flags)
    kind = next(b.dtype for b in program.bindings if b.is_input)
    made = small_cnn.logits_of(program, cnn.images.astype(kind)).astype(np.float32)
    return {
        "accuracy": small_cnn.accuracy(made, cnn.labels),
        "relative_error": small_cnn.relative_error(made, truth),
        "constants_bytes": program.constants_bytes,
    }


def _show(rows: dict[str, dict[str, float]]) -> None:
    table = Table(title="A small CNN, 2,000 images that it never saw")
    for heading in ("ranges and levels", "right", "error of logits", "bytes of constants"):
        table.add_column(heading, justify="left" if heading.startswith("ranges") else "right")
    for way, row in rows.items():
        cells = f"{row['accuracy']:.2%}", f"{row['relative_error']:.4f}"
        table.add_row(way, *cells, f"{row['constants_bytes']:,}")
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
