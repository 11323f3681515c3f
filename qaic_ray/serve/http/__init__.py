"""The interface over HTTP: routes, limits, keys, streams, the process."""
