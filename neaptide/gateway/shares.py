"""What each tenant of a lane has been served, in tokens over its weight, and how many slots are its share. Pure.

The counters are those of VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): they rise with
tokens as these are produced, not as they were asked for. Who comes back after a pause begins where the least served of
those who wait stands (gateway/queue.py): a pause earns nothing, and costs nothing. Each class has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

CLASSES = 3  # 0 is the highest
PROMPT = 0.1  # of a produced token, a prompt's counts: prefill takes about that much of an engine's time
BYTES_A_TOKEN = 4  # of a prompt whose tokens nobody has counted yet
KEPT = 1024  # accounts that are kept although nobody of theirs waits or runs
LATELY_S = 60.0  # who has asked within it is reckoned with
FREE = 8  # one slot in so many is kept for those below their share
FRESH_S = 0.1


class Account:
    """One tenant's; `served` and `asked_s` by class."""

    __slots__ = ("asked_s", "running", "served", "tenant", "waiting", "weight")

    def __init__(self, tenant: str, weight: float) -> None:
        self.tenant, self.weight = tenant, weight
        self.served = [0.0] * CLASSES  # tokens; never falls
        self.asked_s = [-math.inf] * CLASSES  # when it last did
        self.waiting = self.running = 0  # requests

    def charge(self, tokens: float, rank: int) -> None:
        self.served[rank] += tokens / self.weight


class Shares:
    """The accounts of all who have lately asked; a tenant without a weight has 1.

    When all slots are taken, a tenant below its share of them waits for the next one that becomes free: three times the
    mean of that one time in twenty, and much longer where those that run end together. So the last slots, one in FREE,
    are kept for tenants below their share who have asked lately, in that class or a higher one, and wait for nothing.
    """

    __slots__ = ("_accounts", "_lately", "_lately_s", "_most", "_weight", "_weights", "crowded")

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._weights: Mapping[str, float] = {}
        self._most = KEPT
        self._lately: list[list[Account]] = [[] for _ in range(CLASSES)]  # who has asked, as of _lately_s, by class ...
        self._lately_s = -math.inf
        self._weight = [0.0] * CLASSES  # ... and all their weight
        self.crowded = False  # two or more may have asked lately: ask `alone`

    def __len__(self) -> int:
        return len(self._accounts)

    def weigh(self, weights: Mapping[str, float]) -> None:
        """These are in force from now on; what was served stays."""
        self._weights = weights
        for account in self._accounts.values():
            account.weight = weights.get(account.tenant, 1.0)

    def of(self, tenant: str) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._most:
                self._forget()
            account = self._accounts[tenant] = Account(tenant, self._weights.get(tenant, 1.0))
        return account

    def asked(self, account: Account, rank: int, now: float) -> None:
        if now - account.asked_s[rank] >= LATELY_S:
            self._lately_s, self.crowded = -math.inf, True  # somebody new: look again
        account.asked_s[rank] = now

    def alone(self, now: float) -> bool:
        """At most one tenant has asked lately."""
        if now - self._lately_s >= FRESH_S:
            self._lately_s = now
            for rank in range(CLASSES):
                lately = [a for a in self._accounts.values() if self._is_here(a, rank, now)]
                self._lately[rank], self._weight[rank] = lately, sum(a.weight for a in lately)
            self.crowded = len(self._lately[-1]) > 1
        return not self.crowded

    def _is_here(self, account: Account, rank: int, now: float) -> bool:
        if rank == CLASSES - 1 and (account.waiting or account.running):
            return True
        return now - max(account.asked_s[: rank + 1]) < LATELY_S

    def may_take(self, account: Account, rank: int, free: int, slots: int) -> bool:
        """Whether one of the `free` of all `slots` is for a request of it. As of the last `alone`."""
        kept = slots // FREE
        if not kept or free > kept or account.running < self._share(account, rank, slots):
            return True
        others = (a for a in self._lately[rank] if a is not account and not a.waiting)
        return not any(a.running < self._share(a, rank, slots) for a in others)

    def _share(self, account: Account, rank: int, slots: int) -> float:
        return slots * account.weight / max(self._weight[rank], account.weight)

    def _forget(self) -> None:
        """Those of whom nothing is here: they would begin anew where those who wait stand."""
        self._accounts = {name: a for name, a in self._accounts.items() if a.waiting or a.running}
        self._most = max(KEPT, 2 * len(self._accounts))


PROMPT_BYTE = PROMPT / BYTES_A_TOKEN  # what each byte of a prompt is charged when it is sent
