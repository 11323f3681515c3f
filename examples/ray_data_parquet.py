"""Prompts of parquet files, answered through Ray Data into parquet files: an actor a card.

    python examples/ray_data_parquet.py prompts.parquet answers/ --cards 4 \\
        --model smollm2-135m --qpc qpc/smollm2-135m-kv-64pl-512cl-14c-8BS-mx6

The column `prompt` is answered; every column of the input is in the output, with the answer's.
"""

from __future__ import annotations

import argparse
import os

import ray
from ray.data import ActorPoolStrategy, DataContext

from qaic_ray import CardPredictor

# Rows that a card is given at a time: it drains at the end of each, so several times its slots.
BATCH_SIZE = 64


def main() -> None:
    """Read, answer, write."""
    parser = argparse.ArgumentParser(description="Answer the prompts of parquet files.")
    parser.add_argument("input", help="a parquet file, or a folder of them")
    parser.add_argument("output", help="folder for the answers' parquet files")
    parser.add_argument("--model", required=True)
    parser.add_argument("--qpc", required=True, help="at this path on every node")
    parser.add_argument("--sdk", default="auto")
    parser.add_argument("--cards", type=int, default=1, help="actors, each with a card of its own")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--address", help="a Ray cluster; absent: one is started here")
    given = parser.parse_args()

    # A cluster that runs says itself what its nodes have.
    ray.init(given.address or "local", resources=None if given.address else {"QAIC": given.cards})
    DataContext.get_current().execution_options.preserve_order = True
    prompts = ray.data.read_parquet(os.path.abspath(given.input))
    # A block goes to one card whole, and a file may be one block.
    answers = prompts.repartition(target_num_rows_per_block=BATCH_SIZE).map_batches(
        CardPredictor,
        fn_constructor_kwargs={
            "model": given.model,
            "qpc": os.path.abspath(given.qpc),
            "sdk": given.sdk,
            "sampling": {"max_tokens": given.max_tokens},
        },
        compute=ActorPoolStrategy(size=given.cards),
        batch_size=BATCH_SIZE,
        num_cpus=0.1,  # the card does the work
        resources={"QAIC": 1},
    )
    answers.write_parquet(os.path.abspath(given.output))


if __name__ == "__main__":
    main()
