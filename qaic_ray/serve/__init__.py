"""The OpenAI interface in front of an open fleet. The only room of FastAPI and uvicorn."""
