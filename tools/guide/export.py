"""Turns trained weights into the model that ships: a Hugging Face directory, then OpenVINO int8.

    python -m tools.guide.export --weights tools/guide/base.safetensors --tokenizer DIR/hf --hf DIR/model \\
        --out neaptide/models/guide

Needs torch and safetensors; the conversion itself runs in the environment of `neaptide models convert`. The files of
--out are replaced, its README.md stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from neaptide.models.convert import convert
from tools.guide.average import read
from tools.guide.model import Guide, Shape, write_config

LARGEST_BYTES = 10_000_000  # of the shipped directory
CHIPS = Path(__file__).parent / "chips.json"  # questions to begin with, shown by `neaptide chat`


def hugging_face(weights: Path, tokenizer: Path, out: Path) -> None:
    """LlamaForCausalLM's files in `out`, replaced if there."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    state, about = read(weights)
    shape = Shape(**json.loads(about["shape"]))
    Guide(shape).load_state_dict(state)  # a missing or foreign name stops here
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    write_config(shape, out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, out / name)


def ship(converted: Path, out: Path) -> int:
    """Replace the model files of `out`; returns their bytes."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        if old.suffix != ".md":
            old.unlink()
    for file in (*converted.iterdir(), CHIPS):
        shutil.copyfile(file, out / file.name)
    return sum(f.stat().st_size for f in out.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--hf", type=Path, required=True, help="where the Hugging Face directory goes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", default="int8", choices=["int8", "int4", "bf16"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hugging_face(arguments.weights, arguments.tokenizer, arguments.hf)
    with tempfile.TemporaryDirectory() as work:
        done = convert(arguments.hf, Path(work) / "guide", arguments.to)
        size = ship(done.out, arguments.out)
    print(f"{arguments.out}: {size / 1e6:.2f} MB, context {done.model.context_tokens}, {done.model.precision}")
    if size > LARGEST_BYTES:
        raise SystemExit(f"the shipped directory is larger than {LARGEST_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
