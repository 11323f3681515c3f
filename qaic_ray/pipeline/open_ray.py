"""A Ray for a step: the one that is kept on this machine, a cluster's, or a new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qaic_ray.errors import DeviceError, UsageError
from qaic_ray.options import LocalRayOptions, RayOptions
from qaic_ray.pipeline.request import Listener
from qaic_ray.sdk import Sdk

if TYPE_CHECKING:
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.cluster.kept_ray import KeptRay


@contextmanager
def open_ray(
    ray: RayOptions | LocalRayOptions, num_cards: int, *, name: str, sdk: Sdk, listener: Listener
) -> Iterator[Cluster]:
    """Join or start a Ray, and say where its dashboard is, or why it has none.

    Args:
        ray: which one.
        num_cards: the cards of this machine that are wanted of it.
        name: of what is done, for the dashboard.
        sdk: whose cards a Ray that is kept offers.
        listener: who is told.

    Raises:
        UsageError: for a cluster that cannot be joined, or a Ray that cannot be kept.
    """
    from qaic_ray.cluster import dashboard
    from qaic_ray.cluster.cluster import Cluster

    address = ray.address if isinstance(ray, RayOptions) else None
    if address is not None and ray.keep_ray:
        raise UsageError("--keep-ray is for a Ray of this machine: leave out it or --address.")
    lacking = dashboard.missing() if address is None and (ray.dashboard or ray.keep_ray) else None
    if lacking is not None:
        if ray.keep_ray:
            raise UsageError(lacking)
        listener.remark(lacking)
    listener.began("Ray")
    kept = None if address is not None else _kept(ray, num_cards, sdk, listener)
    has_dashboard = ray.dashboard and lacking is None
    with Cluster(
        num_cards, address=address, dashboard=has_dashboard, kept=kept, name=name
    ) as cluster:
        listener.ended("Ray" if kept is None else "Ray, which stays: `qaic-ray ray stop` ends it")
        if cluster.dashboard is not None:
            listener.dashboard(cluster.dashboard.ways_in(os.environ))
        yield cluster


def _kept(
    ray: RayOptions | LocalRayOptions, num_cards: int, sdk: Sdk, listener: Listener
) -> KeptRay | None:
    from qaic_ray.cluster import kept_ray

    if ray.keep_ray:
        return kept_ray.start(max(num_cards, _cards_here(sdk)), wanted=num_cards)
    kept, refusal = kept_ray.usable(num_cards)
    if refusal is not None:
        listener.remark(refusal)
    return kept


def _cards_here(sdk: Sdk) -> int:
    try:
        return len(sdk.devices())
    except DeviceError:
        return 0  # a machine that only compiles
