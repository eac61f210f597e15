"""Tokens as they come, and an early goodbye: leaving the stream frees the replica's slot at once."""

import os
import time

from openai import OpenAI

client = OpenAI()
model = os.environ.get("MODEL") or client.models.list().data[0].id
question = [{"role": "user", "content": "Tell me about the tide, in a few words."}]

start = time.monotonic()
first = None
with client.chat.completions.create(
    model=model, messages=question, max_tokens=64, stream=True, stream_options={"include_usage": True}
) as stream:
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - start
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.completion_tokens} tokens, the first after {first or 0:.3f} s")

with client.chat.completions.create(model=model, messages=question, max_tokens=512, stream=True) as stream:
    for count, _ in enumerate(stream, 1):
        if count == 3:
            break  # closes the connection; the usage row says `aborted` and counts what was made
print("left after 3 chunks")
