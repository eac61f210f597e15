"""The ledger's tables as the newest migration leaves them; tests/test_ledger_migrations.py holds the two together.

Times are seconds since the epoch, UTC. Money is int64 nano-units of the configured currency. Text never holds NUL
(PostgreSQL has none). Usage has no foreign keys: what the journal says has happened enters, whoever was deleted since.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    false,
    text,
)

metadata = MetaData()

meta = Table(
    "meta",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

organisations = Table(
    "organisations",
    metadata,
    Column("id", Text, primary_key=True),  # what a Usage calls its tenant
    Column("name", Text, nullable=False),
    Column("created_s", Double, nullable=False),
)

# Teams and projects are an organisation's own: two organisations may each have a "default".
teams = Table(
    "teams",
    metadata,
    Column("organisation_id", Text, ForeignKey("organisations.id"), primary_key=True),
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_s", Double, nullable=False),
)

projects = Table(
    "projects",
    metadata,
    Column("organisation_id", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("team_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("created_s", Double, nullable=False),
    ForeignKeyConstraint(["organisation_id", "team_id"], ["teams.organisation_id", "teams.id"]),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),  # keyed hash; the key itself is nowhere
    Column("name", Text, nullable=False),
    Column("organisation_id", Text, nullable=False),
    Column("team_id", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("priority", Text, nullable=False),  # highest class it may ask for
    Column("models", Text, nullable=False),  # JSON list; empty: all
    Column("inside", Boolean, nullable=False, server_default=false()),  # never to a replica that is outside
    Column("disabled", Boolean, nullable=False),
    Column("last_four", Text, nullable=False),  # for display
    Column("created_s", Double, nullable=False),
    Column("disabled_s", Double),
    Column("expires_s", Double),  # NULL: never
    Column("scopes", Text, nullable=False, server_default="[]"),  # JSON list; empty: all
    Column("rpm", BigInteger),  # NULL: no limit; so the two below
    Column("tpm", BigInteger),
    Column("concurrency", BigInteger),
    ForeignKeyConstraint(["organisation_id", "team_id"], ["teams.organisation_id", "teams.id"]),
    ForeignKeyConstraint(["organisation_id", "project_id"], ["projects.organisation_id", "projects.id"]),
)

usage = Table(
    "usage",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("client_id", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("revision", Text, nullable=False),
    Column("priority", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("stream", Boolean, nullable=False),
    Column("prompt_bytes", BigInteger, nullable=False),
    Column("max_tokens", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("started_wall_s", Double, nullable=False),
    Column("arrived_mono_s", Double, nullable=False),
    Column("queued_s", Double, nullable=False),
    Column("ttft_s", Double, nullable=False),
    Column("tpot_s", Double, nullable=False),
    Column("itl_max_s", Double, nullable=False),
    Column("engine_s", Double, nullable=False),
    Column("kv_token_s", Double, nullable=False),
    Column("duration_s", Double, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("finish", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("degraded", Text, nullable=False),
    Column("cache", Text, nullable=False, server_default=""),
    Column("price_millis", Integer, nullable=False, server_default="1000"),
    Column("attempts", Text, nullable=False),  # JSON list of {replica, tokens}
    Column("price_version", Integer, nullable=False),
    Column("paid", Text, nullable=False, server_default="[]"),  # JSON list of [budget, reserved, cost]
)

# Pages are in the order of the start; a rare key or the few failures are found without walking through all rows.
NOT_OK = text("outcome <> 'ok'")
Index("usage_started", usage.c.started_wall_s, usage.c.request_id)
Index("usage_key", usage.c.key, usage.c.started_wall_s, usage.c.request_id)
Index(
    "usage_not_ok",
    usage.c.started_wall_s,
    usage.c.request_id,
    sqlite_where=NOT_OK,
    postgresql_where=NOT_OK,
)

charges = Table(
    "charges",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("basis", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("revision", Text, nullable=False),
    Column("amount_nanos", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# Sums an hour, kept in the transaction that adds the rows: totals in milliseconds where a GROUP BY over usage takes
# seconds a million rows, and they outlive the rows' retention.
hourly = Table(
    "hourly",
    metadata,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),  # since the epoch, UTC
    Column("tenant", Text, primary_key=True),
    Column("project", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("outcome", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("amount_nanos", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

journal_offsets = Table(
    "journal_offsets",
    metadata,
    Column("journal", Text, primary_key=True),  # <gateway>-<epoch>
    Column("segment", BigInteger, nullable=False),
    Column("offset", BigInteger, nullable=False),  # bytes of the segment that have been taken
    Column("updated_s", Double, nullable=False),
)

open_begins = Table(
    "open_begins",
    metadata,
    Column("journal", Text, primary_key=True),
    Column("request_id", Text, primary_key=True),
    Column("begin", Text, nullable=False),  # the record's JSON
    sqlite_with_rowid=False,
)

budgets = Table(
    "budgets",
    metadata,
    Column("scope", Text, primary_key=True),  # key:ID | project:TENANT/NAME | tenant:NAME | all
    Column("unit", Text, primary_key=True),  # money | tokens
    Column("period", Text, primary_key=True),  # day | month | total
    Column("amount", BigInteger, nullable=False),  # nano-units or tokens, each period
    Column("strict", Boolean, nullable=False),
    Column("created_s", Double, nullable=False),
    sqlite_with_rowid=False,
)

# By a budget's name, which says the period. What dead gateways have spent is one row, of no gateway. `spent` is added
# to in the transaction that takes the rows which say so, and by nobody else.
leases = Table(
    "leases",
    metadata,
    Column("budget", Text, primary_key=True),
    Column("gateway", Text, primary_key=True),  # <gateway>-<epoch>, as its journal
    Column("granted", BigInteger, nullable=False),
    Column("returned", BigInteger, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("renews_s", Double, nullable=False),  # when the period ends; 0: never
    sqlite_with_rowid=False,
)

price_versions = Table(
    "price_versions",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("since_s", Double, nullable=False),  # in force for requests that start from then on
    Column("currency", Text, nullable=False),
)

prices = Table(
    "prices",
    metadata,
    Column("version", Integer, ForeignKey("price_versions.version"), primary_key=True, autoincrement=False),
    Column("model", Text, primary_key=True),
    Column("prompt_nanos", BigInteger, nullable=False),  # per 10^6 tokens
    Column("cached_nanos", BigInteger, nullable=False),
    Column("output_nanos", BigInteger, nullable=False),
)
