"""Averages two trainings' weights: nearer to what was not taught than either of them (docs/log.md).

    python -m tools.guide.average --weights build/guide/run/base.safetensors --with tools/guide/base.safetensors \\
        --share 0.7 --out build/guide/average.safetensors

It works for weights of which one was trained on from the other. Needs torch and safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights in f32 by name, and the metadata, which has the shape."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}, file.metadata()  # noqa: SIM118


def average(weights: Path, other: Path, share: float, out: Path) -> None:
    """`share` of `weights`, the rest of `other`, in bf16."""
    (ours, about), (theirs, _) = read(weights), read(other)
    if ours.keys() != theirs.keys():
        raise SystemExit(f"{weights} and {other} are not of one shape")
    mixed = {name: (share * ours[name] + (1 - share) * theirs[name]).to(torch.bfloat16) for name in ours}
    save_file(mixed, out, metadata=about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--with", dest="other", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.7, help="of --weights")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    average(arguments.weights, arguments.other, arguments.share, arguments.out)


if __name__ == "__main__":
    main()
