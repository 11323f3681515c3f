"""An emulated Cloud AI SDK: the vendor's folder, commands and Python modules, computing on a CPU.

`install.py` copies this package into an SDK folder as `qaic_emulated_sdk`, where it runs without
qaic_ray; so every import inside it is relative, and it keeps to Python 3.8. The rest of qaic_ray
reaches it only as such a folder. What it covers, its formats, and the files that steer it are in
`docs/emulated-sdk/coverage.md`.
"""
