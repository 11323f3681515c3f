"""Everything that uses Ray: connecting, actors, compile tasks, jobs, the Ray Data step."""

from __future__ import annotations

import os

# Ray reads these when it is imported, and only this package imports it. The first keeps the
# obituary of a dead actor off stdout, where results go; the second, usage reports off the network.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
