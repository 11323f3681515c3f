"""What a compiler or a card would refuse of an artifact, or do worse than it could; and why."""
