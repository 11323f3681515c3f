#!/bin/sh
# A conversation and a stream with curl, of a server that `qaic-ray serve smollm2-135m` began.
#   sh examples/chat.sh http://127.0.0.1:8000/v1
set -eu
base=$1
curl --fail-with-body -sS "$base/models"
echo
curl --fail-with-body -sS "$base/chat/completions" -H "Content-Type: application/json" \
  -d '{"messages": [{"role": "user", "content": "What is a tree?"}], "max_tokens": 32}'
echo
curl --fail-with-body -sSN "$base/completions" -H "Content-Type: application/json" \
  -d '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "stream": true}'
