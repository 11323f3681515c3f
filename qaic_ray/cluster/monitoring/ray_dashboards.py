"""Ray's own Grafana dashboards, as the installed Ray makes them.

Ray writes them into the folder of each session, which goes with it; these are for a folder that
stays. Where they are made is private to Ray.
"""

from __future__ import annotations

import warnings

from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory

_BEGIN, _END = "generate_", "_grafana_dashboard"


def ray_dashboards() -> dict[str, str]:
    """Name of a file, as Ray names it -> the dashboard as JSON text."""
    makers = [name for name in dir(factory) if name.startswith(_BEGIN) and name.endswith(_END)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the files open that it reads
        return {f"{name.removeprefix(_BEGIN)}.json": getattr(factory, name)()[0] for name in makers}
