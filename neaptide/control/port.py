"""What the admin API asks of control, and the nouns of its answers. No behaviour here.

Control implements `ControlPort`; the admin app, the CLI's `--json` and the OpenAPI document all speak these structs.
The methods are coroutines on control's loop: they answer from memory or await a thread, never block. They raise
NeaptideError (its `status` becomes the HTTP status), `NotFoundError` for an id nobody knows. Secrets never stand in
an answer, except `CreatedKey.key`, once.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

from neaptide.cost.budgets import Period, Unit
from neaptide.errors import NeaptideError
from neaptide.types import Choice, Override, Priority, ReplicaState, Scale, Slo, Traits, Usage

Scope = Literal["inference", "models", "tokenize"]
GroupBy = Literal["model", "key", "tenant", "project", "day", "outcome"]


class NotFoundError(NeaptideError):
    """A key, model or row that does not exist."""

    code, exit_code, status = "E601", 1, 404


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the answers: every field is always written, so that scripts need no defaults."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the request bodies and queries: unknown fields are refused."""


# --- status -----------------------------------------------------------------------------------------------------------


class Stage(Answer, frozen=True):
    """One step of a replica's start: spawn, load, warm, ready ..."""

    name: str
    seconds: float


class ProcessStatus(Answer, frozen=True):
    role: str  # supervisor | control | gateway | replica | engine | spare
    id: str  # "gateway-0", "guide-0"
    pid: int
    state: str = "running"  # running | starting | stopping | dead
    started_wall_s: float = 0.0
    restarts: int = 0
    rss_bytes: int | None = None  # None where it cannot be read


class ReplicaStatus(Answer, frozen=True):
    id: str
    deployment: str
    revision: str
    state: ReplicaState
    queued: bool = False  # starting, and in line for it: the host starts others first
    endpoint: str = ""
    remote: bool = False  # somebody else runs it
    epoch: int = 0
    pid: int | None = None
    started_wall_s: float = 0.0
    running: int = 0
    waiting: int = 0
    free_kv_tokens: int | None = None
    kv_tokens: int | None = None
    restarts: int = 0
    stages: tuple[Stage, ...] = ()
    error: str = ""


class DeploymentStatus(Answer, frozen=True):
    model: str
    aliases: tuple[str, ...] = ()
    revision: str = ""
    engine: str = ""  # "" where somebody else runs the replicas
    source: str = ""
    context_tokens: int | None = None
    precision: str = ""
    scale: Scale = Scale()
    slo: Slo = Slo()
    pool: str = ""  # whose replicas serve it beside others
    ready: int = 0  # replicas, of the pool where it is in one
    starting: int = 0
    standby: int = 0
    running: int = 0  # requests
    waiting: int = 0  # requests waiting in the gateways
    failing: str = ""  # why no replica starts


class GatewayStatus(Answer, frozen=True):
    id: str
    pid: int
    epoch: int
    connected: bool  # control hears it
    heard_s: float | None = None  # age of its last gauges
    connections: int = 0
    in_flight: int = 0
    waiting: int = 0
    fast: int = 0  # table versions in force there
    slow: int = 0
    disk: str = ""  # non-empty: new requests are refused because this disk is full


class LedgerStatus(Answer, frozen=True):
    """`lag_*`: what the journals hold that the ledger has not yet taken."""

    url: str  # without password
    ok: bool = True
    lag_bytes: int = 0
    lag_s: float = 0.0  # age of the oldest record not yet taken; 0 when caught up
    rows: int | None = None
    error: str = ""


class DiskStatus(Answer, frozen=True):
    path: str
    free_bytes: int
    total_bytes: int
    used_by: str = "state"  # state | journal | log


class CertificateStatus(Answer, frozen=True):
    """A certificate that is served with."""

    listener: str  # "admin", or the gateway's id
    subject: str
    not_after_wall_s: float
    days_left: float  # below zero: it has expired
    refused: str = ""  # why what lies in its files now is not in force


class Status(Answer, frozen=True):
    version: str
    ready: bool  # every deployment that should have a ready replica has one, a gateway is connected
    now_wall_s: float
    started_wall_s: float
    api_url: str  # http://host:port/v1
    admin_url: str
    config_path: str = ""  # "" = the defaults
    fast: int = 0  # table versions that control wants everywhere
    slow: int = 0
    processes: tuple[ProcessStatus, ...] = ()
    deployments: tuple[DeploymentStatus, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()
    gateways: tuple[GatewayStatus, ...] = ()
    ledger: LedgerStatus | None = None
    disks: tuple[DiskStatus, ...] = ()
    certificates: tuple[CertificateStatus, ...] = ()  # of listeners with TLS


# --- apply, config, decisions -----------------------------------------------------------------------------------------


class Change(Answer, frozen=True):
    """One key of the configuration that differs, secrets shown as "***"."""

    key: str  # "models.small.scale.max", "limits.body_bytes"
    old: str  # as JSON; "" = absent
    new: str


class ApplyReport(Answer, frozen=True):
    """The difference between what runs and the text; with dry_run nothing was done."""

    dry_run: bool
    added: tuple[str, ...] = ()  # models
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    restarts: tuple[str, ...] = ()  # replica ids that are replaced (after their streams have ended)
    notes: tuple[str, ...] = ()  # e.g. "listen takes effect at the next `neaptide up`"


class ConfigView(Answer, frozen=True):
    path: str
    text: str  # as in the file; it holds no secrets, only env: and file: references
    settings: dict[str, Any]  # what is in force, every default written out, secrets "***"


class Decision(Answer, frozen=True):
    """One plan of the control loop, or a hold with its reasons."""

    wall_s: float
    reasons: tuple[str, ...] = ()
    launches: tuple[str, ...] = ()  # replica ids
    drains: tuple[str, ...] = ()
    parks: tuple[str, ...] = ()  # that stand by from then on
    wakes: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()  # a model each, of those whose count may change


class Decisions(Answer, frozen=True):
    rows: tuple[Decision, ...]  # newest first


# --- scaling ----------------------------------------------------------------------------------------------------------


class ScaleRow(Answer, frozen=True):
    """How many replicas a model has, should have, and why. None: not known."""

    model: str  # or the pool ...
    scalable: bool  # false where somebody else runs the replicas
    policy: str
    ready: int
    starting: int
    wanted: int
    min: int
    max: int
    arrivals_per_s: float | None = None  # at the last tick
    expected_per_s: float | None = None  # a cold start from now, where the policy forecasts
    in_flight: int | None = None
    capacity_rps: float = 0.0  # of one replica
    traits: Traits = Traits()
    stages: tuple[Stage, ...] = ()  # of a start, on average
    members: tuple[str, ...] = ()  # ... of these models
    starts: int = 0  # that were measured
    override: Override | None = None
    clamp: str = ""  # budget | max | min | override: what stands above the policy
    sentence: str = ""  # in English
    choice: Choice | None = None  # the same as facts
    standby: int = 0  # replicas that are loaded and given no requests
    cost_per_hour: float | None = None  # of what is there; None: no price is known
    gpu_usage: float | None = None  # mean of its GPUs, 0..1; None: nobody tells


class Scales(Answer, frozen=True):
    currency: str
    rows: tuple[ScaleRow, ...]


class ChoiceRow(Answer, frozen=True):
    wall_s: float
    choice: Choice


class Choices(Answer, frozen=True):
    rows: tuple[ChoiceRow, ...]  # newest first


class NewOverride(Ask, frozen=True):
    model: str
    replicas: int
    for_s: float = 3600.0
    by: str = ""


class ShadowRow(Answer, frozen=True):
    """What a day of a model was, or would have been under another policy."""

    day: str  # YYYY-MM-DD, UTC
    model: str
    policy: str
    real: bool  # what ran; the others are imagined on the same arrivals
    replica_hours: float
    cost: float | None = None  # None: no price is known
    arrivals: float = 0.0
    attainment: float | None = None  # share of the arrivals that were not late; None: none came


class Shadows(Answer, frozen=True):
    currency: str
    rows: tuple[ShadowRow, ...]  # newest day first


# --- keys -------------------------------------------------------------------------------------------------------------


class KeyInfo(Answer, frozen=True):
    id: str
    name: str = ""
    tail: str = ""  # the key's last four characters, to tell keys apart
    tenant: str = "default"
    project: str = ""
    priority: Priority = "normal"
    models: tuple[str, ...] = ()  # empty: all
    inside: bool = False  # as it was made; its tenant may say the same of all its keys
    created_wall_s: float = 0.0
    disabled: bool = False
    expires_wall_s: float | None = None  # None: never
    scopes: tuple[Scope, ...] = ()  # empty: all
    rpm: int | None = None  # None: no limit
    tpm: int | None = None
    concurrency: int | None = None


class NewKey(Ask, frozen=True):
    name: str = ""
    tenant: str = "default"
    project: str = ""
    priority: Priority = "normal"  # the highest class it may ask for
    models: tuple[str, ...] = ()
    inside: bool = False  # its requests never go to a replica that is outside
    expires_wall_s: float | None = None
    scopes: tuple[Scope, ...] = ()
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None


class KeyChange(Ask, frozen=True):
    """What it does not name stays; null takes a limit or the expiry away."""

    expires_wall_s: float | msgspec.UnsetType | None = msgspec.UNSET
    inside: bool | msgspec.UnsetType = msgspec.UNSET
    scopes: tuple[Scope, ...] | msgspec.UnsetType = msgspec.UNSET
    rpm: int | msgspec.UnsetType | None = msgspec.UNSET
    tpm: int | msgspec.UnsetType | None = msgspec.UNSET
    concurrency: int | msgspec.UnsetType | None = msgspec.UNSET


class CreatedKey(Answer, frozen=True):
    key: str  # shown here and never again
    info: KeyInfo


class Keys(Answer, frozen=True):
    rows: tuple[KeyInfo, ...]


class BudgetRow(Answer, frozen=True):
    """A budget in its period of now. Amounts are nano-units of the currency, or tokens, by `unit`."""

    id: str  # SCOPE:UNIT:PERIOD
    name: str  # SCOPE:UNIT:2026-11, as errors and usage rows tell it
    scope: str  # key:ID | project:TENANT/NAME | tenant:NAME | all
    unit: Unit
    period: Period
    amount: int
    strict: bool = False  # requests reserve all of their max_tokens
    spent: int = 0
    lent: int = 0  # of what is left, in the hands of gateways
    left: int = 0
    renews_wall_s: float | None = None  # None: never


class Budgets(Answer, frozen=True):
    currency: str
    rows: tuple[BudgetRow, ...]  # by scope


class NewBudget(Ask, frozen=True):
    scope: str
    unit: Unit
    amount: int | float  # of the currency, or tokens
    period: Period = "month"
    strict: bool = False


class Models(Answer, frozen=True):
    rows: tuple[DeploymentStatus, ...]


# --- usage ------------------------------------------------------------------------------------------------------------


class UsageFilter(Ask, frozen=True):
    """Half-open in time: since <= started < until, wall seconds; None = unbounded."""

    since_s: float | None = None
    until_s: float | None = None
    model: str | None = None
    key: str | None = None
    tenant: str | None = None
    project: str | None = None
    outcome: str | None = None


class UsageRow(Answer, frozen=True):
    usage: Usage
    amount_nanos: int | None = None  # None: no price for that model


class UsagePage(Answer, frozen=True):
    rows: tuple[UsageRow, ...]  # newest first
    next: str | None  # cursor of the page after this one; None at the end
    currency: str


class UsageTotal(Answer, frozen=True):
    group: str  # the model, key id, tenant ..., "" for the sum of all; a day is YYYY-MM-DD, UTC
    requests: int = 0
    ok: int = 0
    refused: int = 0
    failed: int = 0  # error, timeout, lost
    aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    output_tokens: int = 0
    amount_nanos: int = 0


class UsageTotals(Answer, frozen=True):
    by: GroupBy
    currency: str
    rows: tuple[UsageTotal, ...]  # at most 1,000 groups, largest amount, then most requests, first
    total: UsageTotal


# --- actions ----------------------------------------------------------------------------------------------------------


class BackupReport(Answer, frozen=True):
    path: str
    bytes: int
    files: int
    sha256: str
    duration_s: float
    notes: tuple[str, ...] = ()


class DownReport(Answer, frozen=True):
    accepted: bool
    grace_s: float


class Done(Answer, frozen=True):
    ok: bool = True


class ControlPort(Protocol):
    async def status(self) -> Status: ...

    async def apply(self, text: str, dry_run: bool, origin: str) -> ApplyReport:
        """`origin`: the file's absolute path, "" for that of the configuration in force; relative sources start beside
        it. ConfigError (400) when the text does not parse; nothing has changed then."""

    async def config(self) -> ConfigView: ...

    async def decisions(self, limit: int) -> Decisions: ...

    async def models(self) -> Models: ...

    async def scales(self) -> Scales: ...

    async def choices(self, model: str, limit: int) -> Choices:
        """Why a model's count is what it is, the latest first; "" for all models. NotFoundError."""

    async def set_override(self, new: NewOverride) -> ScaleRow:
        """A count that holds for a while, restarts included. NotFoundError; AdminError-like 400 outside the bounds."""

    async def clear_override(self, model: str) -> ScaleRow: ...

    async def shadows(self, model: str, days: int) -> Shadows: ...

    async def keys(self) -> Keys: ...

    async def create_key(self, new: NewKey) -> CreatedKey: ...

    async def set_key(self, key_id: str, change: KeyChange) -> KeyInfo:
        """The key as it stands after; gateways hold it to that once their table has it. NotFoundError."""

    async def revoke_key(self, key_id: str) -> KeyInfo:
        """The key as it stands after: disabled, and refused by every gateway once its table has it. NotFoundError."""

    async def budgets(self) -> Budgets: ...

    async def set_budget(self, new: NewBudget) -> BudgetRow:
        """A new one, or another amount of one that there is. RequestError 400 for what cannot be one."""

    async def remove_budget(self, budget_id: str) -> BudgetRow:
        """As it stood; nobody is stopped by it any more. NotFoundError."""

    async def usage(self, where: UsageFilter, cursor: str | None, limit: int) -> UsagePage:
        """`cursor` is a `UsagePage.next`; ConfigError-like NeaptideError with status 400 when it is not."""

    async def usage_totals(self, where: UsageFilter, by: GroupBy) -> UsageTotals: ...

    async def backup(self) -> BackupReport:
        """A new archive in the state directory's backup/ (see neaptide.control.backup)."""

    async def down(self, grace_s: float) -> DownReport:
        """Asks the supervisor to stop everything within grace_s; returns at once."""
