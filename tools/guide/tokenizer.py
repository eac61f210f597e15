"""Trains the bilingual byte-level BPE tokenizer and writes a Hugging Face tokenizer directory.

Byte level, so that no input is unknown; digits are split one by one, so that numbers copy digit by digit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tools.guide.sources import dialogues

VOCAB_SIZE = 8192
PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = (
    "<|pad|>",
    "<|begin|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
SPECIAL = [PAD, BEGIN, END, SYSTEM, USER, ASSISTANT]  # ids 0..5, in this order
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Letters, single digits, punctuation runs, white space; a leading space stays with its word.
SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(f"the corpus gave {tokenizer.get_vocab_size()} tokens, {vocab_size} were asked for")
    return tokenizer


def save(tokenizer: Tokenizer, out: Path, context_tokens: int) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def corpus(samples: Path) -> Iterator[str]:
    """Each distinct message of a samples file once, then every second dialogue: the samples alone repeat themselves
    so much that the vocabulary would fill with their sentences."""
    seen: set[str] = set()
    with samples.open(encoding="utf-8") as lines:
        for line in lines:
            seen.update(message["content"] for message in json.loads(line)["messages"])
    yield from sorted(seen)
    for i, (_, _, messages) in enumerate(dialogues()):
        if i % 2 == 0:
            yield from messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="samples.jsonl of tools.guide.data")
    parser.add_argument("--out", type=Path, required=True, help="directory of the tokenizer files")
    parser.add_argument("--vocab", type=int, default=VOCAB_SIZE)
    parser.add_argument("--context", type=int, default=4096)
    arguments = parser.parse_args()
    tokenizer = train(corpus(arguments.samples), arguments.vocab)
    save(tokenizer, arguments.out, arguments.context)
    texts = list(corpus(arguments.samples))
    count = sum(len(e.ids) for e in tokenizer.encode_batch(texts))
    print(f"{tokenizer.get_vocab_size()} tokens; {sum(map(len, texts)) / count:.2f} characters a token on its corpus")


if __name__ == "__main__":
    main()
