"""Muon (Jordan et al., 2024) for the matrices, AdamW for the embedding and the norms.

Muon replaces a momentum matrix by its nearest orthogonal one, found by a quintic Newton-Schulz iteration; matrices of
one shape are stacked, because batched products keep a single thread busy where small ones do not.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the reference implementation: fast, not exact, singular values ~ 0.7-1.2


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """[N, rows, cols] -> the same shape, each matrix near its orthogonal factor."""
    a, b, c = COEFFICIENTS
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for params in shapes.values():
                self._update(params, group["lr"], group["momentum"])

    def _update(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        looked_ahead = []
        for p in params:
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            looked_ahead.append(p.grad.lerp(buffer, momentum))  # Nesterov
        rows, columns = params[0].shape
        scale = max(1.0, rows / columns) ** 0.5
        for p, update in zip(params, orthogonal(torch.stack(looked_ahead))):
            p.add_(update, alpha=-lr * scale)
