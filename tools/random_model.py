"""Makes a random-weight Llama for benchmarks, and converts it: its text means nothing, its work is real.

    python tools/random_model.py --out DIR [--size 100m|tiny] [--to int8|int4|bf16|none]

100m: 110M parameters, 12 layers of width 768, 32,000 tokens, context 8,192; tiny: about 1M, for a quick try. Writes
DIR/hf (Hugging Face) and, unless --to none, DIR/<to> (OpenVINO). The tokenizer is the guide's, padded with made-up
words, so that every id decodes to text. Needs numpy; the conversion makes an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from neaptide.models.convert import convert  # noqa: E402

SIZES = {
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 8192},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 9000, "max_position_embeddings": 4096},
}  # fmt: skip
# Wide enough that the next token depends on the context: at the usual 0.02 a tied model repeats its input for ever.
SPREAD = 0.08
EMBEDDING, SPECIALS = "model.embed_tokens.weight", 6
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "an", "or")]


def shapes(size: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """LlamaForCausalLM's parameters; the head is tied to the embedding."""
    width, hidden = size["hidden_size"], size["intermediate_size"]
    q = size["num_attention_heads"] * size["head_dim"]
    kv = size["num_key_value_heads"] * size["head_dim"]
    yield EMBEDDING, (size["vocab_size"], width)
    for i in range(size["num_hidden_layers"]):
        at = f"model.layers.{i}"
        yield f"{at}.self_attn.q_proj.weight", (q, width)
        yield f"{at}.self_attn.k_proj.weight", (kv, width)
        yield f"{at}.self_attn.v_proj.weight", (kv, width)
        yield f"{at}.self_attn.o_proj.weight", (width, q)
        yield f"{at}.mlp.gate_proj.weight", (hidden, width)
        yield f"{at}.mlp.up_proj.weight", (hidden, width)
        yield f"{at}.mlp.down_proj.weight", (width, hidden)
        yield f"{at}.input_layernorm.weight", (width,)
        yield f"{at}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)


def write_weights(path: Path, size: dict[str, int], seed: int) -> int:
    """A safetensors file of bf16 values, written tensor by tensor; returns the number of parameters."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes(size):
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, shape in shapes(size):
            one = len(shape) == 1
            values = np.ones(shape, np.float32) if one else rng.standard_normal(shape, np.float32) * SPREAD
            if name == EMBEDDING:
                values[:SPECIALS] = 0  # a logit of zero: no special token, the end included, is ever the likeliest
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # the upper half of f32 is bf16
    return at // 2


def made_up_words(taken: set[str]) -> Iterator[str]:
    """Words of two to four syllables, with byte-level BPE's leading space, never one of `taken`."""
    for count in (2, 3, 4):
        for parts in product(SYLLABLES, repeat=count):
            word = "Ġ" + "".join(parts)
            if word not in taken:
                yield word


def write_tokenizer(out: Path, vocab_size: int) -> None:
    """The guide's tokenizer files with made-up words up to `vocab_size` ids."""
    guide = ROOT / "neaptide" / "models" / "guide"
    tokenizer = json.loads((guide / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    words = made_up_words(set(vocab))
    for id in range(len(vocab), vocab_size):
        vocab[next(words)] = id
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (out / name).write_bytes((guide / name).read_bytes())


def make(out: Path, size_name: str, seed: int) -> int:
    """A Hugging Face directory in `out`; returns the number of parameters."""
    size = SIZES[size_name]
    out.mkdir(parents=True, exist_ok=False)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **size, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(out, size["vocab_size"])
    return write_weights(out / "model.safetensors", size, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=list(SIZES), default="100m")
    parser.add_argument("--to", choices=["int8", "int4", "bf16", "none"], default="int8")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    parameters = make(arguments.out / "hf", arguments.size, arguments.seed)
    print(f"{arguments.out / 'hf'}: {parameters:,} parameters", flush=True)
    if arguments.to != "none":
        convert(arguments.out / "hf", arguments.out / arguments.to, arguments.to)


if __name__ == "__main__":
    main()
