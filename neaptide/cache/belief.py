"""May this kept answer serve that question? What has been seen of it, and what follows. Pure.

After vCache (arXiv 2502.03771): an entry is shown questions at a similarity s, a judge says whether its answer was right
for each, and P(right | s) = sigmoid(gain * (s - threshold)) is learnt from that, entry by entry. Where vCache fits one
gain and threshold and bounds their error, here all of a grid keep their likelihood: few observations, or such that a
fit has no end for (all right), need no exception. The published rule bounds the errors among all requests; `wrong` is of
the single answer, and one is served only where that is at most what the operator allows.

An entry begins with what the others of its deployment have shown, for as much as POOLED observations (a power prior):
it learns its own difference from there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
LEAST = 6  # observations of a deployment before any answer is served
POOLED = 30.0  # observations that the others' experience counts for at most
_GAINS = np.geomspace(8.0, 160.0, 12, dtype=np.float32)[:, None]  # per unit of similarity
_THRESHOLDS = np.linspace(0.5, 1.2, 57, dtype=np.float32)[None, :]  # above 1: not even the same words do


class Belief:
    """Of one entry, or of all of a deployment: the log-likelihood of each gain and threshold, (12, 57)."""

    __slots__ = ("count", "log")

    def __init__(self) -> None:
        self.log: Floats = np.zeros((len(_GAINS), _THRESHOLDS.shape[1]), np.float32)
        self.count = 0

    def saw(self, similarity: float, right: bool) -> None:
        """A question so similar was judged: the kept answer would have been right for it, or not."""
        x = _GAINS * (np.float32(similarity) - _THRESHOLDS)
        self.log -= np.logaddexp(0.0, -x if right else x)
        self.count += 1


def wrong(own: Belief, pool: Belief, similarity: float) -> float:
    """`pool`: of all entries, this one among them. How likely it is that the kept answer is wrong for a question so similar, 0 to 1: 1 - a, with vCache's bound

    a = max over e of (1 - e) * (the chance of being right that is exceeded with confidence 1 - e)
    """
    if pool.count < LEAST:
        return 1.0
    others = pool.count - own.count
    log = own.log + (pool.log - own.log) * min(1.0, POOLED / max(others, 1))
    weight = np.exp(log - log.max())
    right = 1 / (1 + np.exp(-_GAINS * (np.float32(similarity) - _THRESHOLDS)))
    order = np.argsort(right, axis=None)
    exceeded = 1 - np.cumsum(weight.ravel()[order]) / weight.sum()
    below = np.concatenate(([1.0], exceeded[:-1]))  # confidence that it is at least this good
    return float(1 - np.max(below * right.ravel()[order]))
