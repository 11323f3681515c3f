"""What may be chosen about an exported graph. Knows nothing of how it is made."""

from __future__ import annotations

from dataclasses import dataclass

from qaic_ray.contract import IoContract
from qaic_ray.errors import UsageError

OPSETS = (17,)
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class ExportOptions:
    """The choices that change the graph, and so its key.

    `continuous` gives every row a slot of its own (`batch_index`). `dtype` is the type of weights
    and KV cache in the ONNX files; logits are float32 always.

    Raises:
        UsageError: on construction, for a value that is not among the known ones.
    """

    contract: IoContract = IoContract.POSITION_IDS
    continuous: bool = False
    opset: int = 17
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.contract is not IoContract.POSITION_IDS:
            raise UsageError(f"The {self.contract.value} contract cannot be exported yet.")
        if self.opset not in OPSETS:
            raise UsageError(f"opset must be {' or '.join(map(str, OPSETS))}, not {self.opset}.")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype must be {' or '.join(DTYPES)}, not {self.dtype!r}.")
