"""The server as an application of Ray Serve: replicas of the interface, and replicas of cards."""
