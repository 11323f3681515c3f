"""The environment variables that people may set, for help pages and the reference."""

from __future__ import annotations

ENVIRONMENT = {
    "QAIC_RAY_SDK": "The SDK where --sdk, or a job's sdk, is auto: a name or a folder.",
    "QAIC_RAY_CACHE": "Folder of what is kept between commands.",
    "QAIC_RAY_LOCKS": "Folder of the locks by which processes of a machine share its cards.",
}
"""The variables that change what is done."""
