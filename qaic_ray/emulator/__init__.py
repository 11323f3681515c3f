"""An emulated Cloud AI SDK: the vendor's folder, commands and Python modules, computing on a CPU.

Knows nothing of the rest of qaic_ray, which reaches it only as a folder. `install.py` copies this
package into that folder as `qaic_emulated_sdk`, where it runs without qaic_ray; so every import
inside it is relative, and it keeps to Python 3.8.
"""
