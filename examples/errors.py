"""What a refusal looks like to the SDK, and what a request may say about itself."""

import os

import openai
from openai import OpenAI

client = OpenAI(max_retries=2)  # 429 carries Retry-After, which the SDK follows
model = os.environ.get("MODEL") or client.models.list().data[0].id

try:
    client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "hi"}])
except openai.NotFoundError as error:
    print(f"{error.status_code} {error.code}: {error.body['message']}")

try:
    OpenAI(api_key="sk-wrong").models.list()
except openai.AuthenticationError as error:
    print(f"{error.status_code} {error.code}: {error.body['message']}")

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Is it high water?"}],
    max_tokens=64,
    # low | normal | high, clamped by the key; the deadline is refused early rather than missed late.
    extra_headers={"x-neaptide-priority": "high", "x-neaptide-deadline-ms": "60000", "x-request-id": "my-id-1"},
)
print(answer.choices[0].finish_reason)
