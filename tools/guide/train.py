"""Trains the guide on prepared conversations, within a time budget, on one CPU thread or a GPU.

    python -m tools.guide.train --samples DIR/samples.jsonl --tokenizer DIR/hf --out DIR/run --minutes 28

The learning rate follows the share of the budget that is spent (warm-up, flat, then down to zero), so a slower machine
sees fewer tokens but still ends cooled down. With --steps the budget is a count, and a run repeats exactly.
Conversations are packed into rows, each seeing only itself, and only the assistant's words are learnt.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tools.guide.model import Guide, Shape
from tools.guide.muon import Muon

BEGIN, END, ROLE = 1, 2, {"system": 3, "user": 4, "assistant": 5}
HEAD = 14  # tokens that are left of the last answer where a conversation is cut
POOL = 24  # conversations among which a row looks for one that fits
Encoded = tuple[list[int], list[bool]]  # ids; True where the token is the assistant's to predict


@dataclass(frozen=True, slots=True)
class Batch:
    ids: Tensor  # [B, T]
    positions: Tensor  # [B, T], from 0 in each conversation
    document: Tensor  # [B, T], which conversation; -1 = padding
    learnt: Tensor  # [B, T] bool: predict this token from the one before it


def encode(tokenizer: Tokenizer, messages: list[dict[str, str]], cut: bool = False) -> Encoded:
    """The chat template's ids, written out: begin, then role, text, end for each message; a cut conversation ends
    after its last answer's first words, which decide what is answered at half the tokens."""
    ids, learnt = [BEGIN], [False]
    for message in messages:
        text = tokenizer.encode(message["content"].strip(), add_special_tokens=False).ids
        if cut and message is messages[-1]:
            head = text[:HEAD]
            return [*ids, ROLE[message["role"]], *head], [*learnt, False, *[True] * len(head)]
        if message["role"] == "text":
            return [*ids, *text, END], [False, *[True] * (len(text) + 1)]
        ids += [ROLE[message["role"]], *text, END]
        learnt += [False, *[message["role"] == "assistant"] * (len(text) + 1)]
    return ids, learnt


def _encoded(tokenizer: Tokenizer, line: str) -> Encoded:
    sample = json.loads(line)
    return encode(tokenizer, sample["messages"], sample.get("cut", False))


def rows(samples: list[Encoded], length: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Endless rows of whole conversations of at most `length` tokens together; each epoch in a new order. The longest
    of the next `POOL` that still fits is taken, which fills 97 % of a row where the next one alone fills 84 %."""
    while True:
        order = list(range(len(samples)))
        rng.shuffle(order)
        pool, row, used = [order.pop() for _ in range(min(POOL, len(order)))], [], 0
        while pool:
            fits = [i for i in pool if used + len(samples[i][0]) <= length]
            if not fits:
                yield row
                row, used = [], 0
                continue
            taken = max(fits, key=lambda i: len(samples[i][0])) if row else pool[0]
            row.append(samples[taken])
            used += len(samples[taken][0])
            pool.remove(taken)
            if order:
                pool.append(order.pop())
        yield row


def batch(source: Iterator[list[Encoded]], size: int, length: int) -> Batch:
    shape = (size, length)
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    document, learnt = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
    for b in range(size):
        at = 0
        for d, (tokens, targets) in enumerate(next(source)):
            end = at + len(tokens)
            ids[b, at:end] = torch.tensor(tokens)
            positions[b, at:end] = torch.arange(len(tokens))
            document[b, at:end] = d
            learnt[b, at:end] = torch.tensor(targets)
            at = end
    return Batch(ids, positions, document, learnt)


def loss_of(model: Guide, batch: Batch) -> Tensor:
    """Mean cross entropy over the assistant's tokens."""
    t = batch.ids.shape[1]
    same = batch.document[:, :, None] == batch.document[:, None, :]
    causal = torch.ones(t, t, dtype=torch.bool, device=batch.ids.device).tril()
    hidden = model(batch.ids, batch.positions, (same & causal)[:, None])
    learnt = batch.learnt[:, 1:]
    logits = model.logits(hidden[:, :-1][learnt])
    return F.cross_entropy(logits.float(), batch.ids[:, 1:][learnt])


def pace(spent: float) -> float:
    """Learning-rate factor at a share of the budget: warm-up to 3 %, flat to 55 %, straight down to zero."""
    if spent < 0.03:
        return max(spent / 0.03, 0.02)
    return 1.0 if spent < 0.55 else max(0.0, (1 - spent) / 0.45)


@torch.no_grad()
def validate(model: Guide, batches: list[Batch]) -> float:
    return sum(loss_of(model, b).item() for b in batches) / len(batches)


def save(model: Guide, path: Path, shape: Shape) -> None:
    """bf16 weights; the shape travels in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt", "shape": json.dumps(asdict(shape))})


def run(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    rng = random.Random(arguments.seed)
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    with arguments.samples.open(encoding="utf-8") as lines:
        samples = [_encoded(tokenizer, line) for line in lines]
    samples = [s for s in samples if len(s[0]) <= arguments.length]
    held, samples = samples[:400], samples[400:]
    print(f"{len(samples)} conversations, {sum(len(s[0]) for s in samples):,} tokens an epoch", flush=True)
    shape = Shape(vocab=tokenizer.get_vocab_size())
    model = Guide(shape)
    if arguments.init:
        model.load_state_dict({k: v.float() for k, v in load_file(arguments.init).items()})
    if arguments.compile:
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    held_rows = rows(held, arguments.length, random.Random(0))
    held_batches = [batch(held_rows, 8, arguments.length) for _ in range(4)]
    train_loop(model, shape, rows(samples, arguments.length, rng), held_batches, arguments)


def train_loop(
    model: Guide, shape: Shape, source: Iterator[list[Encoded]], held: list[Batch], arguments: argparse.Namespace
) -> None:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() < 2 or "embed" in n]
    muon = Muon(matrices, lr=arguments.lr)
    adam = torch.optim.AdamW(others, lr=arguments.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimisers = [(muon, arguments.lr), (adam, arguments.adam_lr)]
    began = saved = time.monotonic()
    step = tokens = learnt = 0
    smooth = float("nan")
    while True:
        now = time.monotonic()
        spent = step / arguments.steps if arguments.steps else (now - began) / (arguments.minutes * 60)
        if spent >= 1:
            break
        b = batch(source, arguments.rows, arguments.length)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss = loss_of(model, b)
        loss.backward()
        for optimiser, rate in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * pace(spent)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        tokens += int((b.document >= 0).sum())
        learnt += int(b.learnt.sum())
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 20 == 0:
            speed = tokens / (time.monotonic() - began)
            print(f"{spent:6.1%} step {step} loss {smooth:.3f} tokens {tokens:,} ({speed:,.0f}/s)", flush=True)
        if now - saved > 300:
            save(model, arguments.out / "checkpoint.safetensors", shape)
            saved = now
            print(f"       held-out loss {validate(model, held):.3f}", flush=True)
    report = {
        "steps": step,
        "tokens": tokens,
        "assistant_tokens": learnt,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "train_loss": round(smooth, 4),
        "held_out_loss": round(validate(model, held), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": arguments.seed,
        "threads": arguments.threads,
    }
    save(model, arguments.out / "base.safetensors", shape)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="go on from these weights; they need the same tokenizer")
    parser.add_argument("--minutes", type=float, default=28)
    parser.add_argument("--steps", type=int, default=0, help="a fixed count instead of --minutes")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=384, help="tokens a row")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's, for the matrices")
    parser.add_argument("--adam-lr", type=float, default=0.004, help="AdamW's, for the embedding and the norms")
    parser.add_argument("--compile", action="store_true", help="a fifth faster after a minute; needs a C++ compiler")
    parser.add_argument(
        "--bf16", action="store_true", help="where the processor has it (avx512_bf16, amx); else slower"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
