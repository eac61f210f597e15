"""Decisions worth a flag: what the control loop did, and each new reason to hold. Pure."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from neaptide.control.reasons import LANGUAGES, sentence, words
from neaptide.types import Choice, Plan, Reason

KEPT = 500
MAX_MODELS = 1000  # whose last word is remembered
NUMBER = re.compile(r"\d+(\.\d+)?")


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """One decision about one model, as people read it."""

    id: int
    t: float  # wall s
    model: str
    action: Literal["launch", "drain", "hold"]
    sentences: dict[str, tuple[str, ...]]  # by language
    replicas: tuple[str, ...] = ()  # that start or leave
    before: int | None = None
    after: int | None = None
    policy: str = ""
    clamp: str = ""
    numbers: dict[str, float] = {}
    cost_per_hour: float | None = None  # None: no price is known
    cost_change_per_hour: float | None = None


class Flags:
    """The last KEPT flags. A hold that only counts its numbers on is no news."""

    def __init__(self) -> None:
        self.recent: deque[Flag] = deque(maxlen=KEPT)
        self._said: dict[str, tuple[object, ...]] = {}
        self._next = 1

    def note(self, wall_s: float, plan: Plan) -> list[Flag]:
        """The plan's news, oldest first."""
        told = [self._of_choice(wall_s, c, plan) for c in plan.choices]
        if not plan.choices:
            told = [self._of_reason(wall_s, r, plan) for r in plan.why]
        fresh = [f for f in told if self._is_news(f)]
        self.recent.extend(fresh)
        return fresh

    def _is_news(self, flag: Flag) -> bool:
        said = (flag.action, flag.after, tuple(NUMBER.sub("#", s) for s in flag.sentences["en"]))
        same = self._said.get(flag.model) == said and not flag.replicas
        if len(self._said) > MAX_MODELS:
            self._said.clear()
        self._said[flag.model] = said
        return not same

    def _of_choice(self, wall_s: float, choice: Choice, plan: Plan) -> Flag:
        priced = bool(choice.cost_per_hour or choice.cost_change_per_hour)
        model, up, down = choice.model, choice.action == "launch", choice.action == "drain"
        moved = (*_launched(plan, model), *_of(model, plan.wakes)) if up else ()
        gone = (*_of(model, plan.drains), *_of(model, plan.parks)) if down else ()
        why = [r for r in plan.why if model in (r.of, model_of(r.of))]
        return Flag(
            id=self._number(),
            t=wall_s,
            model=model,
            action=choice.action,
            sentences={x: (sentence(choice, x), *(words(r, x) for r in why)) for x in LANGUAGES},
            replicas=(*moved, *gone),
            before=choice.before,
            after=choice.after,
            policy=choice.policy,
            clamp=choice.clamp,
            numbers=choice.numbers,
            cost_per_hour=choice.cost_per_hour if priced else None,
            cost_change_per_hour=choice.cost_change_per_hour if priced else None,
        )

    def _of_reason(self, wall_s: float, reason: Reason, plan: Plan) -> Flag:
        """A reason is about a model or about one of its replicas."""
        drained = reason.of in plan.drains
        model = model_of(reason.of) if drained else reason.of
        started = _launched(plan, model) if reason.name == "start" else ()
        action: Literal["launch", "drain", "hold"] = "drain" if drained else "launch" if started else "hold"
        said: dict[str, tuple[str, ...]] = {x: (words(reason, x),) for x in LANGUAGES}
        moved = (reason.of,) if drained else started
        return Flag(id=self._number(), t=wall_s, model=model, action=action, sentences=said, replicas=moved)

    def _number(self) -> int:
        self._next += 1
        return self._next - 1


def _launched(plan: Plan, model: str) -> tuple[str, ...]:
    return tuple(x.replica for x in plan.launches if x.deployment == model)


def _of(model: str, replicas: Iterable[str]) -> tuple[str, ...]:
    return tuple(r for r in replicas if model_of(r) == model)


def model_of(replica: str) -> str:
    """guide-0 -> guide."""
    head, _, tail = replica.rpartition("-")
    return head if head and tail.isdigit() else replica


def since(flags: Iterable[Flag], last: int) -> Sequence[Flag]:
    """Those after the flag with number `last`."""
    return [f for f in flags if f.id > last]
