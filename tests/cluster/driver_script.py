"""A driver of its own: joins the cluster at argv[1], runs the prompts in argv[3:] on two cards."""

from __future__ import annotations

import signal
import sys

import fake_worker
import ray

from qaic_ray.cluster.cluster import Cluster
from qaic_ray.rows import Prompt
from qaic_ray.runs.driver import Audience
from qaic_ray.worker.worker import WorkerInfo


def tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_pid(info: WorkerInfo) -> None:
    tell(info.sdk.split("pid ")[1].split(",")[0])


# A shell's background job, as the tests may be in, has its children ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
ray.cloudpickle.register_pickle_by_value(fake_worker)
address, row_s, *texts = sys.argv[1:]
with Cluster(0, address=address) as cluster:
    result = cluster.run_prompts(
        [Prompt(i, text) for i, text in enumerate(texts)],
        fake_worker.specs(2, row_s=float(row_s)),  # type: ignore[arg-type]
        worker_class=fake_worker.FakeWorker,  # type: ignore[arg-type]
        policy=fake_worker.IMPATIENT,
        audience=Audience(on_worker_ready=print_pid),
    )
    tell(f"failed {result.total.failed_rows}")
