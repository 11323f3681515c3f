"""What comes of a step: the tokens of its rows, and the logprobs of their prompts."""
