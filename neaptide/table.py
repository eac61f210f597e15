"""The table: what control tells gateways, and what gateways tell control back. Pure nouns and their difference.

Two parts, each with its own version: the fast part (replicas: seconds) and the slow part (deployments, keys: minutes).
Control sends TABLE frames: a Delta from the version the gateway holds, or a whole Table after FETCH or a gap. A
gateway persists what it holds (0600) and starts from it while control is away.

    type    from      payload
    HELLO   both      link.Hello, role gateway / control; the gateway's is followed by FETCH
    FETCH   gateway   JSON {"fast": version, "slow": version} it holds (0, 0: nothing)
    TABLE   control   JSON Delta; `base_*` equal to what the gateway holds, or whole=True
    GAUGES  gateway   JSON Gauges, every 250 ms and at once when a request starts to wait with no ready replica
    WAKE    control   reserved

Of budgets (docs/decisions/0039-budgets-in-leases.md), each in the order of sending:

    LEASES  gateway   JSON Leases, whole, right after control's HELLO: nothing else of these is heard before
    ASK     gateway   JSON Ask; GRANT answers it
    GRANT   control   JSON Granted
    RECALL  control   JSON Recalled; RETURN answers it
    RETURN  gateway   JSON Returned; without a RECALL, too
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import msgspec

from neaptide.link import MAX_FRAME
from neaptide.tls.settings import ReplicaTls
from neaptide.types import Rate


class Timeouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds. `first_byte_s` runs from dispatch; `idle_s` between bytes of a stream; `total_s` from dispatch."""

    connect_s: float = 5.0
    first_byte_s: float = 300.0
    idle_s: float = 60.0
    total_s: float = 900.0


class Caching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answers that are given again to identical requests of one tenant, in each gateway process."""

    ttl_s: float = 0.0  # how old an answer may be; 0: none is kept
    memory_mib: int = 64  # for answers, those being recorded included
    price: float = 0.0  # of one that is given again, as a share of the list price

    @property
    def is_sane(self) -> bool:
        return 0 <= self.ttl_s < float("inf") and self.memory_mib >= 1 and 0 <= self.price <= 1

    @property
    def price_millis(self) -> int:
        """`price` in thousandths, as usage rows have it."""
        return round(self.price * 1000)


class Degrade(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Under pressure: once a newcomer would wait longer than `wait_s`, one of the others."""

    wait_s: float
    max_tokens: int | None = None  # answers are no longer than that
    model: str = ""  # requests go to this deployment
    stale_s: float | None = None  # an answer from the cache may be so old
    refuse: Literal["low"] | None = None  # requests of this class are refused

    @property
    def kinds(self) -> list[str]:
        """What it does: exactly one of DEGRADES, if it is sound."""
        return [name for name in DEGRADES if getattr(self, name) not in (None, "")]


DEGRADES = ("max_tokens", "model", "stale_s", "refuse")  # in the order in which they are to come


def unsound(steps: Sequence[Degrade], cached: bool, others: Collection[str]) -> str:
    """What is wrong with these steps of a deployment; "" where nothing is. `others`: the models they may name."""
    before = 0.0, -1
    for step in steps:
        kinds, most = step.kinds, step.max_tokens if step.stale_s is None else step.stale_s
        if len(kinds) != 1 or not before[0] < step.wait_s < float("inf") or not (most is None or most > 0):
            return (
                "each step has one of max_tokens, model, stale_s and refuse, over 0, and a longer wait_s than the last"
            )
        if step.model and step.model not in others:
            return f"{step.model} is no other model of this file"
        if step.stale_s is not None and not cached:
            return "stale_s needs a cache: add cache: {ttl_s: 300}"
        place = DEGRADES.index(kinds[0])
        if place <= before[1]:
            return f"the order is {', '.join(DEGRADES)}, each once"
        before = step.wait_s, place
    return ""


class ReplicaRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    model: str  # the deployment's name
    endpoint: str  # "link:PATH" | "http://host:port/base"
    revision: str = ""
    epoch: int = 0
    state: str = "ready"  # ready | draining: it leaves or stands by, and is given nothing
    token: str = ""  # boot token (link) or API key to send (http); never logged
    remote_model: str = ""  # spliced into the body when the replica knows the model by another id
    max_running: int | None = None  # at most; None = unlimited until adaptive concurrency binds
    resumes: bool = False  # http: it goes on with a text that another has begun
    members: dict[str, str] = {}  # of a pool, whose name `model` is then: revision by model
    tls: ReplicaTls | None = None  # of an https endpoint; None: checked against the system's store
    outside: bool = False  # what is sent there leaves the house: never a request whose key keeps its data inside

    def serves(self) -> Collection[str]:
        """The models that it takes requests for."""
        return self.members or (self.model,)

    def revision_of(self, model: str) -> str:
        return self.members.get(model, self.revision)


class DeploymentRow(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    aliases: tuple[str, ...] = ()
    revision: str = ""
    timeouts: Timeouts = Timeouts()
    max_waiting: int = 1024  # requests that may wait in the gateway; past it 429
    max_wait_s: float = 60.0  # longest wait; past it 429 with Retry-After
    created_s: int = 0  # for /v1/models
    owned_by: str = "neaptide"
    max_tokens_default: int = 1024
    failing: str = ""  # why no replica starts; non-empty and no replica: 503 with this text
    slo_ttft_s: float = 1.0  # a first token that comes later is counted as late
    traffic: dict[str, int] = {}  # percent of new requests by revision; empty: whichever replica has room
    slo_tpot_s: float = 0.1
    adaptive: bool = False  # how many requests a replica gets that does not tell what it takes is learnt
    affinity: bool = False  # prompts that begin alike go to the same replica: it has a prefix cache that they share
    cache: Caching = Caching()
    degrade: tuple[Degrade, ...] = ()


class Quota(msgspec.Struct, frozen=True, array_like=True):
    """What a key may take, or all keys of a tenant together; None: without limit."""

    of: Literal["key", "tenant"]
    rpm: int | None = None  # requests in any minute
    tpm: int | None = None  # tokens in any minute, of prompts and answers
    concurrency: int | None = None  # requests at once, those that wait included


def quotas(
    of: Literal["key", "tenant"], rpm: int | None, tpm: int | None, concurrency: int | None
) -> tuple[Quota, ...]:
    """One, or none where there is no limit."""
    return () if rpm is tpm is concurrency is None else (Quota(of, rpm, tpm, concurrency),)


class KeyRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    digest: str  # hex of blake2b(key, key=pepper, digest_size=32)
    name: str = ""
    tenant: str = "default"
    project: str = ""
    priority: str = "normal"  # highest class this key may ask for
    models: tuple[str, ...] = ()  # empty: all
    inside: bool = False  # its requests never go to a replica that is outside
    disabled: bool = False
    budgets: tuple[str, ...] = ()  # that its requests are paid from, by their names in this period
    strict: bool = False  # they reserve all of the max_tokens that they ask for
    expires_wall_s: float | None = None  # refused from then on; None: never
    scopes: tuple[str, ...] = ()  # inference | models | tokenize; empty: all
    quotas: tuple[Quota, ...] = ()  # its own and its tenant's


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """Of the deployments that have one."""

    version: int = 0
    currency: str = ""
    rates: dict[str, Rate] = {}  # by deployment


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    body_bytes: int = 8 << 20
    header_bytes: int = 32 << 10
    header_s: float = 10.0  # to send the whole head
    body_s: float = 60.0  # to send the whole body
    keep_alive_s: float = 75.0
    connections: int = 20_000
    inflight_bytes: int = 512 << 20  # request bodies held at once, all connections together


class Cors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    origins: tuple[str, ...] = ()  # empty: off


class Slow(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 0
    deployments: tuple[DeploymentRow, ...] = ()
    keys: tuple[KeyRow, ...] = ()
    limits: Limits = Limits()
    cors: Cors = Cors()
    auth: bool = True  # false only where the config says `auth: off`
    weights: dict[str, float] = {}  # by tenant; 1 where none is given
    prices: Prices = Prices()


class Fast(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 0
    replicas: tuple[ReplicaRow, ...] = ()


class Table(msgspec.Struct, frozen=True, kw_only=True):
    fast: Fast = Fast()
    slow: Slow = Slow()


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """From (base_fast, base_slow) to (fast, slow). Keys go as additions and removals, the rest goes whole."""

    base_fast: int = 0
    base_slow: int = 0
    fast: int = 0
    slow: int = 0
    whole: bool = False
    replicas_put: tuple[ReplicaRow, ...] = ()
    replicas_gone: tuple[str, ...] = ()
    deployments: tuple[DeploymentRow, ...] | None = None
    keys_put: tuple[KeyRow, ...] = ()
    keys_gone: tuple[str, ...] = ()
    limits: Limits | None = None
    cors: Cors | None = None
    auth: bool | None = None
    weights: dict[str, float] | None = None
    prices: Prices | None = None


class ModelGauge(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Signals of one deployment in one gateway; counters rise from the gateway's start."""

    arrivals: int = 0
    waiting: int = 0
    oldest_wait_s: float = 0.0
    running: int = 0
    done: int = 0
    errors: int = 0
    tokens: int = 0
    late: int = 0  # of those done: no first token within the SLO, for want of room or by an error of ours
    firsts: int = 0  # of those done: had a first token ...
    ttft_sum_s: float = 0.0
    paced: int = 0  # ... and a time between tokens
    tpot_sum_s: float = 0.0
    served: int = 0  # ended well ...
    held_sum_s: float = 0.0  # ... having held a replica's slot for so long, all together


class Want(NamedTuple):
    """What a gateway lacks of a budget: nano-units or tokens."""

    wanted: int  # by those who wait there
    left: int  # in its lease; below zero where it owes


class Held(NamedTuple):
    """What a gateway has had of a budget."""

    got: int  # of all grants
    gave: int  # back


class CertificateGauge(msgspec.Struct, frozen=True, kw_only=True):
    """The certificate that a listener serves with."""

    subject: str
    not_after_s: float  # wall
    refused: str = ""  # why a newer one, which lies in its files, is not in force


class Leases(NamedTuple):
    """What a gateway holds, by its own account."""

    connection: int  # of this gateway, counted by it: what an older one still holds is not heard
    held: dict[str, Held]  # by budget
    more: bool = False  # another part follows


class Ask(NamedTuple):
    """To control."""

    number: int
    wants: dict[str, Want]  # by budget


class Granted(NamedTuple):
    """To a gateway, of one Ask."""

    number: int
    amounts: dict[str, int]  # by budget
    exhausted: tuple[str, ...]  # budgets that have no more than this
    unknown: bool = False  # control does not know yet


class Recalled(NamedTuple):
    """To a gateway: give back what is not reserved of this budget."""

    budget: str
    round: int


class Returned(NamedTuple):
    """A gateway gives back; `round`: of the RECALL that it answers, 0 of none."""

    budget: str
    amount: int
    round: int = 0


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    gateway: str
    mono_s: float
    fast: int  # table versions in force
    slow: int
    connections: int = 0
    models: dict[str, ModelGauge] = {}
    replicas: dict[str, int] = {}  # replica id -> requests in flight from here
    unreachable: tuple[str, ...] = ()  # replicas whose connection failed lately
    erring: tuple[str, ...] = ()  # replicas that are left out because they answer with errors
    disk: str = ""  # non-empty: new requests are refused because this disk is full
    certificate: CertificateGauge | None = None


def difference(old: Table, new: Table) -> Delta:
    """The delta that turns `old` into `new`; versions are the callers' to raise."""
    before = {r.id: r for r in old.fast.replicas}
    after = {r.id: r for r in new.fast.replicas}
    had = {k.id: k for k in old.slow.keys}
    has = {k.id: k for k in new.slow.keys}
    return Delta(
        base_fast=old.fast.version,
        base_slow=old.slow.version,
        fast=new.fast.version,
        slow=new.slow.version,
        replicas_put=tuple(r for i, r in after.items() if before.get(i) != r),
        replicas_gone=tuple(i for i in before if i not in after),
        deployments=new.slow.deployments if new.slow.deployments != old.slow.deployments else None,
        keys_put=tuple(k for i, k in has.items() if had.get(i) != k),
        keys_gone=tuple(i for i in had if i not in has),
        limits=new.slow.limits if new.slow.limits != old.slow.limits else None,
        cors=new.slow.cors if new.slow.cors != old.slow.cors else None,
        auth=new.slow.auth if new.slow.auth != old.slow.auth else None,
        weights=new.slow.weights if new.slow.weights != old.slow.weights else None,
        prices=new.slow.prices if new.slow.prices != old.slow.prices else None,
    )


def whole(table: Table) -> Delta:
    """`table` as a delta from nothing."""
    slow = table.slow
    return Delta(
        fast=table.fast.version,
        slow=slow.version,
        whole=True,
        replicas_put=table.fast.replicas,
        deployments=slow.deployments,
        keys_put=slow.keys,
        limits=slow.limits,
        cors=slow.cors,
        auth=slow.auth,
        weights=slow.weights,
        prices=slow.prices,
    )


def apply(table: Table, delta: Delta) -> Table | None:
    """The table after `delta`; None when the delta does not start where `table` stands (ask for the whole)."""
    if delta.whole:
        table = Table()
    elif (delta.base_fast, delta.base_slow) != (table.fast.version, table.slow.version):
        return None
    replicas = {r.id: r for r in table.fast.replicas if r.id not in set(delta.replicas_gone)}
    replicas.update((r.id, r) for r in delta.replicas_put)
    keys = {k.id: k for k in table.slow.keys if k.id not in set(delta.keys_gone)}
    keys.update((k.id, k) for k in delta.keys_put)
    old = table.slow
    slow = Slow(
        version=delta.slow,
        deployments=old.deployments if delta.deployments is None else delta.deployments,
        keys=tuple(keys.values()),
        limits=delta.limits or old.limits,
        cors=delta.cors or old.cors,
        auth=old.auth if delta.auth is None else delta.auth,
        weights=old.weights if delta.weights is None else delta.weights,
        prices=delta.prices or old.prices,
    )
    return Table(fast=Fast(version=delta.fast, replicas=tuple(replicas.values())), slow=slow)


PART_BYTES = MAX_FRAME // 2  # of a part with its keys; the longest row still fits beside it


def parts(delta: Delta) -> list[Delta]:
    """`delta` with its keys cut so that each part fits one frame; applied in order they equal it. The first part
    carries all that is not a key."""
    first = msgspec.structs.replace(delta, keys_put=())
    used = len(msgspec.json.encode(first))
    cuts: list[list[KeyRow]] = [[]]
    for row in delta.keys_put:
        size = len(msgspec.json.encode(row)) + 1  # and a comma
        if used and used + size > PART_BYTES:
            used = 0
            cuts.append([])
        used += size
        cuts[-1].append(row)
    rest = Delta(base_fast=delta.fast, base_slow=delta.slow, fast=delta.fast, slow=delta.slow)
    more = [msgspec.structs.replace(rest, keys_put=tuple(rows)) for rows in cuts[1:]]
    return [msgspec.structs.replace(first, keys_put=tuple(cuts[0])), *more]
