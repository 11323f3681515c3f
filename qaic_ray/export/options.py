"""What may be chosen about an exported graph. Knows nothing of how it is made."""

from __future__ import annotations

from dataclasses import dataclass

from qaic_ray.contract import COMP_CTX_LENGTHS, NUM_LOGITS_TO_KEEP, IoContract
from qaic_ray.errors import UsageError

OPSETS = (13, 17)
DTYPES = ("float32", "float16")
KV_DTYPES = ("float16", "mxint8")

LAST = "last"
ALL = "all"
LOGITS = (LAST, ALL, NUM_LOGITS_TO_KEEP)


@dataclass(frozen=True)
class ExportOptions:
    """The choices that change the files, and so their key.

    `continuous` gives every row a slot of its own (`batch_index`). `opset` 13 is for the SDKs up
    to Apps 1.20. `dtype` is the type of weights and KV cache in the ONNX files, `kv_dtype` the
    type of the cache on the card (custom_io.yaml). `logits` says of which tokens there are logits
    (float32 always): the last one of a row, all, or as many as the input `num_logits_to_keep` is
    long. With `next_tokens` the output is their most likely token ids instead of logits.
    `num_replicate_kv_heads` stores every key and value head so many times, for device groups that
    share out the heads. With `comp_ctx_lengths` there is an input of that name, whose length says
    how many positions of the context a run computes with.

    Raises:
        UsageError: on construction, for a value that is not among the known ones.
    """

    contract: IoContract = IoContract.POSITION_IDS
    continuous: bool = False
    opset: int = 17
    dtype: str = "float32"
    kv_dtype: str = "float16"
    logits: str = LAST
    next_tokens: bool = False
    num_replicate_kv_heads: int = 1
    comp_ctx_lengths: bool = False

    def __post_init__(self) -> None:
        for key, known in (
            ("opset", OPSETS),
            ("dtype", DTYPES),
            ("kv_dtype", KV_DTYPES),
            ("logits", LOGITS),
        ):
            value = getattr(self, key)
            if value not in known:
                raise UsageError(f"{key} must be {' or '.join(map(str, known))}, not {value!r}.")
        if self.num_replicate_kv_heads < 1:
            raise UsageError(
                f"num_replicate_kv_heads must be at least 1, not {self.num_replicate_kv_heads}."
            )
        if self.contract is IoContract.CACHE_INDEX:
            if self.continuous:
                raise UsageError(
                    "The cache-index contract has one cache_index for all rows, so there is no "
                    "continuous batching with it; use position-ids."
                )
            if self.logits == NUM_LOGITS_TO_KEEP:
                raise UsageError(
                    f"The cache-index contract has no {NUM_LOGITS_TO_KEEP}; use position-ids, or "
                    "logits last or all."
                )
            if self.comp_ctx_lengths:
                raise UsageError(
                    f"The cache-index contract has no {COMP_CTX_LENGTHS}; use position-ids."
                )
        if self.comp_ctx_lengths and self.opset < 17:
            raise UsageError(
                f"{COMP_CTX_LENGTHS} needs opset 17: the compilers of older opsets know no such "
                "input."
            )
