"""The built-in guide, a demo model: asks it what it suggests, in both its languages."""

import json
from pathlib import Path

from openai import OpenAI

client = OpenAI()
chips = json.loads((Path(__file__).parent.parent / "neaptide/models/guide/chips.json").read_text("utf-8"))
print("guide (demo model)\n")
for question in [*chips["en"], *chips["zh"]]:
    answer = client.chat.completions.create(model="guide", messages=[{"role": "user", "content": question}])
    print(f"> {question}\n{answer.choices[0].message.content}\n")
