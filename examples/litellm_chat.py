"""A conversation through litellm, which speaks to many servers by one function.

qaic-ray serve smollm2-135m
pip install litellm
python examples/litellm_chat.py http://127.0.0.1:8000/v1
"""

import sys

import litellm

answer = litellm.completion(
    model="hosted_vllm/smollm2-135m",
    api_base=sys.argv[1],
    api_key="none",
    messages=[{"role": "user", "content": "What is a tree?"}],
    max_tokens=48,
)
print(answer.choices[0].message.content)
