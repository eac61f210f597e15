"""May this kept answer serve that question? What judges have said so far, and what follows from it. Pure.

After vCache (arXiv 2502.03771): while it is not sure, the model answers and a judge says whether the kept answer would
have been right; P(right) is a logistic curve fitted to that; served is what is likely enough right. Here

- the curve is of a deployment, not of each kept question: those are asked about once or twice, which teaches nothing;
- it sees three things (`Near`), not the similarity alone;
- it is a posterior (a normal prior, Laplace's approximation): few or one-sided observations are no exception;
- `error` is of the answers that are served. vCache's is of all requests, hits or not: at 1 % it lets 2.5 % of hits be
  wrong;
- the curve may have the wrong form. So it is tried first: what it would have served is judged, and nothing is served
  while too much of that was wrong.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
REMEMBERED = 2_000  # observations; the oldest go first
AUDITED = 0.05  # of what would be served, asked and judged all the same
_PRIOR_SD = 3.0
_Z95 = 1.645
_STEPS = 25  # Newton's, at most; one or two from the last fit
_CLOSE = 1e-3


class Near(NamedTuple):
    """How a question lies to the kept one that is nearest to it."""

    similarity: float  # cosine
    lead: float  # by how much the nearest one with another answer is farther
    shared: float  # of the words of both, 0 to 1

    def scaled(self) -> tuple[float, float, float, float]:
        """With the constant; each about -1 to 1."""
        return 1.0, 5.0 * self.similarity - 4.0, 10.0 * self.lead - 1.0, 2.0 * self.shared - 1.0


class Belief:
    """What is known of a deployment, where at most `error` (0 to 1) of the hits may be wrong. A fit takes about a
    millisecond, a question to it 20 us; 100 KB at most."""

    __slots__ = ("_covariance", "_remembered", "_right", "_seen", "_tried", "_weights", "count", "error")

    def __init__(self, error: float, remembered: int = REMEMBERED) -> None:
        self.error = error
        self._remembered = remembered
        self.count = 0
        self._seen = np.zeros((0, 4))
        self._right = np.zeros(0, bool)
        self._tried = np.zeros(0, bool)  # the curve, as it stood, would have served it
        self._weights = np.zeros(4)
        self._covariance: Floats = np.eye(4) * _PRIOR_SD**2

    def serves(self, near: Near) -> bool:
        return self.trial <= self.error and self.wrong(near) <= self.error

    @property
    def trial(self) -> float:
        """How much of what the curve alone would serve is wrong, at most: the upper bound of a count, with about 95 %
        confidence at each look. It holds whatever the form of the curve."""
        tried = int(self._tried.sum())
        wrong = tried - int((self._tried & self._right).sum()) + 1
        return (wrong + _Z95 * math.sqrt(wrong)) / (tried + 2)

    def wrong(self, near: Near) -> float:
        """How likely the kept answer is wrong, 0 to 1: the curve's mean over the posterior (MacKay's)."""
        x = np.array(near.scaled())
        variance = float(x @ self._covariance @ x)
        return float(_sigmoid(-(x @ self._weights) / np.sqrt(1 + np.pi / 8 * variance)))

    def saw(self, near: Near, right: bool) -> None:
        """A judge: the kept answer would have been right, or not."""
        drop = max(0, len(self._seen) + 1 - self._remembered)
        self._tried = np.append(self._tried[drop:], self.wrong(near) <= self.error)
        self._seen = np.vstack((self._seen[drop:], near.scaled()))
        self._right = np.append(self._right[drop:], right)
        self.count += 1
        self._fit()

    def _fit(self) -> None:
        """Newton's method; a step that overshoots is halved."""
        x, precision = self._seen, np.eye(4) / _PRIOR_SD**2
        weights, loss = self._weights, self._loss(self._weights)
        for _ in range(_STEPS):
            p = _sigmoid(x @ weights)
            curvature = x.T @ (x * (p * (1 - p))[:, None]) + precision
            self._covariance = np.asarray(np.linalg.inv(curvature), np.float64)
            step = self._covariance @ (x.T @ (self._right - p) - precision @ weights)
            while (after := self._loss(weights + step)) > loss and np.abs(step).max() > _CLOSE:
                step = step / 2
            weights, loss = weights + step, after
            if np.abs(step).max() <= _CLOSE:
                break
        self._weights = weights

    def _loss(self, weights: Floats) -> float:
        logits = self._seen @ weights
        doubt = np.logaddexp(0, np.where(self._right, -logits, logits)).sum()
        return float(doubt + weights @ weights / (2 * _PRIOR_SD**2))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -x)), np.float64)
