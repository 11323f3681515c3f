"""`python -m qaic_ray` is the command `qaic-ray`."""

from qaic_ray.cli import main

if __name__ == "__main__":
    main()
