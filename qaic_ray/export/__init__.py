"""One checkpoint: its graph with the KV cache as retained state, its weights, and the proof."""

from qaic_ray.called_room import can_be_called

can_be_called(__name__)
