"""One compiler: variants of a model, built once and kept by content."""

from qaic_ray.called_room import can_be_called

can_be_called(__name__)
