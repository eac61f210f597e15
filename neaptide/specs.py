"""What each process is told at its start: one JSON document on stdin (docs/decisions/0001)."""

from __future__ import annotations

import msgspec

from neaptide.tls.settings import ListenTls


class MemberSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What is a model's own in a replica that serves several; the fields of ReplicaSpec of the same names."""

    model: str
    revision: str
    source: str = ""
    options: dict[str, msgspec.Raw] = {}
    slo_tpot_s: float = 0.1
    prefix_cache: str = "shared"
    max_tokens_default: int = 1024


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of own replicas; an engine ignores none of them silently: it refuses what it does not know. They are
    read here and not in config, which an engine process would import for them alone, YAML and all."""

    threads: int | None = None  # engine threads; None = the machine's cores
    kv_mib: int | None = None  # KV memory; None = a share of free memory
    max_running: int | None = None  # requests decoded together; None = 64
    chunk_tokens: int | None = None  # prefill chunk; None = calibrated against slo.tpot_s
    precision: str | None = None  # inference precision hint: f32 | bf16; None = the engine's choice
    context_tokens: int | None = None  # a smaller context than the model's
    cpus: tuple[int, ...] = ()  # pin the engine process
    io_cpus: tuple[int, ...] = ()  # pin the replica's I/O process
    step_log: bool = False  # write what each step computed and took, for the simulator to learn
    echo_ttft_ms: float = 0.0  # echo only
    echo_tpot_ms: float = 0.0  # echo only


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True):
    id: str  # "guide-0"; its sockets and log carry this name
    epoch: int
    model: str  # the deployment's name, shown to clients
    revision: str
    engine: str  # openvino | echo
    source: str = ""  # resolved model directory; "" for echo
    options: dict[str, msgspec.Raw] = {}  # the engine's own settings: threads, kv_mib, chunk_tokens, max_running ...
    slo_tpot_s: float = 0.1
    prefix_cache: str = "shared"  # shared | tenant | off
    max_tokens_default: int = 1024  # where the client gives no limit
    token: str = ""  # boot token that the link's HELLO must carry
    link_path: str = ""
    http_path: str = ""  # Unix socket for health, metrics and the OpenAI API
    http_host: str = ""  # or TCP, when a replica is started by hand
    http_port: int = 0
    cache_dir: str = ""  # calibration survives restarts here
    log_path: str = ""  # JSON lines
    grace_s: float = 20.0
    engine_cpus: tuple[int, ...] = ()  # pin the engine process; empty = the kernel's choice
    io_cpus: tuple[int, ...] = ()
    members: tuple[MemberSpec, ...] = ()  # of a pool, whose name `model` is then; empty: the one model above

    def each(self) -> tuple[ReplicaSpec, ...]:
        """A spec for each model it serves, in order; each still names all the members."""
        if not self.members:
            return (self,)
        return tuple(msgspec.structs.replace(self, **msgspec.structs.asdict(m)) for m in self.members)


class GatewaySpec(msgspec.Struct, frozen=True, kw_only=True):
    id: str  # "gateway-0"
    epoch: int
    listen_fd: int
    control_path: str
    table_path: str  # persisted table, 0600
    journal_dir: str  # journal/<gateway>-<epoch>
    pepper: str  # hex key of the keyed hash over API keys
    token: str  # boot token
    access_log: str = ""  # JSON lines, rotated; "" = off
    segment_bytes: int = 8 << 20
    grace_s: float = 20.0
    version: str = ""
    tls: ListenTls | None = None
    tls_leaf: str = ""  # where the certificate in force is told
    counters_fd: int | None = None  # what all gateways of this host count limits in; None: this one counts alone


class ControlSpec(msgspec.Struct, frozen=True, kw_only=True):
    epoch: int
    admin_fd: int
    config_path: str  # neaptide.yaml; "" = defaults
    state_dir: str
    supervisor_path: str
    control_path: str
    token: str
    api_url: str  # http://host:port/v1
    admin_url: str
    grace_s: float = 20.0
    admin_tls: ListenTls | None = None
