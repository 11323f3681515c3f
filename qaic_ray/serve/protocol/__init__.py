"""The OpenAI interface as data: bodies of requests and answers. No sockets, no waiting."""
