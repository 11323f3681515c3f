"""A streamed conversation, an answer in a form, and a batch, with openai-python.

qaic-ray serve smollm2-135m
python examples/openai_chat.py http://127.0.0.1:8000/v1
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key=sys.argv[2] if len(sys.argv) > 2 else "none")
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is a tree?"}],
    max_tokens=48,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n{chunk.usage.completion_tokens} tokens")

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Is the sky blue?"}],
    temperature=0,
    extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
)
print(answer.choices[0].message.content)

with tempfile.TemporaryDirectory() as folder:
    requests = Path(folder) / "requests.jsonl"
    bodies = [{"prompt": f"{n} plus {n} is", "max_tokens": 4, "temperature": 0} for n in range(8)]
    requests.write_text(
        "".join(
            json.dumps(
                {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body}
            )
            + "\n"
            for n, body in enumerate(bodies)
        )
    )
    file = client.files.create(file=requests, purpose="batch")
batch = client.batches.create(
    input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
)
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(0.2)
    batch = client.batches.retrieve(batch.id)
print(batch.status, batch.request_counts)
for line in client.files.content(batch.output_file_id).text.splitlines():
    row = json.loads(line)
    print(row["custom_id"], row["response"]["body"]["choices"][0]["text"])
