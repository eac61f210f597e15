"""What a request-level run simulates beside requests and policy; a msgspec struct, so that YAML can hold one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from neaptide.config import strict_yaml
from neaptide.errors import ConfigError
from neaptide.simulate.cold import Stage, boot_s
from neaptide.simulate.engine import Traits
from neaptide.simulate.routes import RouteName
from neaptide.simulate.spot import Spot
from neaptide.simulate.steps import Linear, pairs_of, piece_at, prefill_s
from neaptide.simulate.world import World
from neaptide.types import Standby

FLUID_STEPS = 500  # in which a request of the fluid world is served


class Setup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    engine: Traits = Traits()
    tick_s: float = 5.0  # how often the policy sees the load
    slo_ttft_s: float = 2.0
    slo_tpot_s: float | None = None  # a replica's capacity is what it serves within it; None: all that it can
    in_tokens: int = 512  # of requests that tell no lengths
    out_tokens: int = 128
    lengths: Literal["trace", "fixed"] = "trace"  # fixed: all have these lengths, whatever the trace says
    replicas: int | None = (
        None  # at the beginning, or all along without a policy; None: what the first ten minutes need
    )
    max_replicas: int = 1000
    capacity_rps: float | None = None  # of a replica, as the policy is told; None: from the engine and the mean lengths
    boot: tuple[Stage, ...] = (Stage(name="start", seconds=180.0),)
    warm_s: float = 0.0  # a node that a replica has left keeps its caches for so long
    line: Literal["gateway", "replica"] = "gateway"  # who waits for a place in a batch waits there
    lookahead: int = 2  # with a line in the gateway: requests that a replica gets beyond its batch
    route: RouteName = "least-loaded"
    lag_s: float = 0.0  # the policy sees the load as it was so long ago; its own replicas as they are
    spot: Spot | None = None
    standby: Standby = Standby()  # what the policy lets go and how many of it stand by; the cold start says how long
    billing_s: float = 1.0  # a replica is paid for whole ones of these, from its launch on; 0: to the moment

    def __post_init__(self) -> None:
        if self.tick_s <= 0 or min(self.lag_s, self.warm_s, self.billing_s, self.lookahead) < 0:
            raise ValueError("tick_s is over 0; lag_s, warm_s, billing_s and lookahead are 0 or more")
        if min(self.in_tokens, self.out_tokens, self.max_replicas) < 1 or (self.replicas or 0) < 0:
            raise ValueError("in_tokens, out_tokens and max_replicas are 1 or more, replicas 0 or more")
        if self.capacity_rps is not None and self.capacity_rps <= 0:
            raise ValueError("capacity_rps is over 0")
        if not self.standby.is_sane:
            raise ValueError("standby.max is 0 or more, standby.rent over 0 and at most 1")

    @property
    def cold_start_s(self) -> float:
        """On a node without caches."""
        return boot_s(self.boot)


def read_setup(path: Path) -> Setup:
    """A YAML file of these keys (docs/decisions/0022 has an example). ConfigError: E101 no such file, E102 not YAML or
    a key that stands twice, E105 names the key that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise ConfigError(f"{path} cannot be read", why=why, code="E101", fix="pass a file that can") from e
    try:
        return msgspec.convert(strict_yaml(text, str(path)) or {}, Setup)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{path}: {e}", code="E105", fix="see docs/decisions/0022-request-level-tiers.md") from None


class Capacity(NamedTuple):
    """One replica's: requests/s that it serves, requests that it runs at once then."""

    rps: float
    slots: float


def capacity(setup: Setup, in_tokens: float, out_tokens: float) -> Capacity:
    """When requests of these mean lengths never end: the largest batch that KV memory and slo_tpot_s allow. Each of
    its steps also prefills its share of the prompts that come for those who leave."""
    traits = setup.engine
    context = in_tokens + out_tokens / 2
    first_s = traits.step.prefill_base_s  # of a step with prompts; at most one a step, however many prompts
    prompt_s = prefill_s(traits.step, in_tokens, pairs_of(round(in_tokens), 0)) - first_s
    batch = traits.max_batch
    if traits.kv_tokens is not None:
        batch = max(1, min(batch, int(traits.kv_tokens * (1 - traits.headroom) / context)))

    def step_s(size: int) -> float:
        piece = piece_at(traits.step.pieces(size), context * size)
        prompts = size / out_tokens  # that begin, a step
        decode_s = piece.at_zero_s + piece.per_token_s * context * size
        return decode_s + prompt_s * prompts + first_s * min(1.0, prompts)

    while setup.slo_tpot_s is not None and batch > 1 and step_s(batch) > setup.slo_tpot_s:
        batch -= 1
    rps = batch / (out_tokens * step_s(batch))
    if setup.capacity_rps is not None:
        return Capacity(setup.capacity_rps, min(float(batch), setup.capacity_rps * batch / rps))
    return Capacity(rps, float(batch))


def of_world(world: World, capacity_rps: float) -> Setup:
    """The fluid tier's world, request by request: each holds one of capacity x service places for service_s, nothing
    depends on the batch, and the line is the gateway's. TTFT is the wait and up to two steps of 1/500 service. Who
    waits longer than slack_s is late here, there who still waits when the tick ends in which slack_s ends."""
    step_s = world.service_s / FLUID_STEPS
    slots = max(1, round(capacity_rps * world.service_s))
    traits = Traits(
        step=Linear(base_s=step_s), max_batch=slots, chunk_tokens=slots * (1 + FLUID_STEPS), kv_tokens=None,
        prefix_block_tokens=0,
    )  # fmt: skip
    return Setup(
        engine=traits,
        tick_s=world.tick_s,
        slo_ttft_s=world.slack_s + 1.5 * step_s,
        in_tokens=1,
        out_tokens=FLUID_STEPS,
        lengths="fixed",
        capacity_rps=capacity_rps,
        boot=(Stage(name="start", seconds=world.cold_start_s),),
        lookahead=0,
        billing_s=0.0,
        standby=world.standby,
    )
