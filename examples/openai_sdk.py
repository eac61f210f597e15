"""The OpenAI SDK against Neaptide: the address and key come from OPENAI_BASE_URL and OPENAI_API_KEY, nothing else
changes."""

import os

from openai import OpenAI

client = OpenAI()
names = [model.id for model in client.models.list()]
print("served:", ", ".join(names))

answer = client.chat.completions.create(
    model=os.environ.get("MODEL", names[0]),
    messages=[{"role": "user", "content": "What is time to first token?"}],
    max_tokens=64,
)
print(answer.choices[0].message.content)
if answer.usage:
    print(f"{answer.usage.prompt_tokens} tokens in, {answer.usage.completion_tokens} out")
print("request", answer._request_id)  # the same id stands in `neaptide logs` and `neaptide usage --rows`
