"""What a step refuses."""


class TokenError(Exception):
    """A token id that the model's table of embeddings has no row for."""
