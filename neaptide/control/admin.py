"""The admin API: Starlette over a ControlPort, on a listener of its own.

Every operation stands once in OPERATIONS: the routes and the OpenAPI document are both made from it, so that they
cannot differ. The guard goes ahead of all of them, the gate around each: the role it needs, its line in the audit log.
Only /health, the documents and the pages' assets need no token; none of them tells anything of the running service.
No CORS: pages of other origins have no business here.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from neaptide import __version__
from neaptide.control import notes
from neaptide.control.chain import AuditPage, AuditQuery
from neaptide.control.gate import Access
from neaptide.control.guard import WHO, AdminError, Front, Guard, answer, failure
from neaptide.control.port import (
    ApplyReport,
    BackupReport,
    BudgetRow,
    Budgets,
    Choices,
    ConfigView,
    ControlPort,
    CreatedKey,
    Decisions,
    DownReport,
    GroupBy,
    KeyChange,
    KeyInfo,
    Keys,
    Models,
    NewBudget,
    NewKey,
    NewOverride,
    ScaleRow,
    Scales,
    Shadows,
    Status,
    UsageFilter,
    UsagePage,
    UsageTotals,
)
from neaptide.control.roles import AdminInfo, AdminList, CreatedAdmin, NewAdmin, Who, need_of
from neaptide.errors import NeaptideError

T = TypeVar("T")


# --- operations -------------------------------------------------------------------------------------------------------


class NoQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No query parameters."""


class ApplyQuery(NoQuery, frozen=True, kw_only=True):
    dry_run: bool = False  # only tell the difference
    origin: str = ""  # absolute path of the file: relative sources are looked for beside it; "" = beside the last one


async def _apply(a: Ask) -> ApplyReport:
    return await a.port.apply(a.body, a.query.dry_run, a.query.origin)


class UsageQuery(UsageFilter, frozen=True, kw_only=True):
    cursor: str | None = None  # `next` of the page before
    limit: int = 100  # rows, 1 to 1,000


class TotalsQuery(UsageFilter, frozen=True, kw_only=True):
    by: GroupBy = "model"


class DecisionsQuery(NoQuery, frozen=True, kw_only=True):
    limit: int = 50  # plans, 1 to 500


class WhyQuery(NoQuery, frozen=True, kw_only=True):
    model: str = ""  # "" = every model
    limit: int = 20  # choices, 1 to 200


class ModelQuery(NoQuery, frozen=True, kw_only=True):
    model: str


class BudgetQuery(NoQuery, frozen=True, kw_only=True):
    id: str


class ShadowsQuery(NoQuery, frozen=True, kw_only=True):
    model: str = ""  # "" = every model
    days: int = 1  # the last ones, 1 to 35


class DownQuery(NoQuery, frozen=True, kw_only=True):
    grace_s: float = 20.0  # seconds that running answers get


class Ask(NamedTuple):
    """One request, parsed: path parameters, query struct, body; and whose it is."""

    port: ControlPort
    path: dict[str, str]
    query: Any
    body: Any
    access: Access
    who: Who


class Operation(NamedTuple):
    id: str  # operationId; "op.<id>" is its text in the catalogue
    method: str
    path: str  # below /api/v1
    answer: Any  # the struct of a 200 (201) answer
    run: Callable[[Ask], Awaitable[Any]]
    query: Any = NoQuery
    body: Any = None  # None: no body; str: text; a struct: JSON
    status: int = 200


OPERATIONS = (
    Operation("getStatus", "GET", "/status", Status, lambda a: a.port.status()),
    Operation("apply", "POST", "/apply", ApplyReport, _apply, ApplyQuery, str),
    Operation("getConfig", "GET", "/config", ConfigView, lambda a: a.port.config()),
    Operation("listModels", "GET", "/models", Models, lambda a: a.port.models()),
    Operation("listKeys", "GET", "/keys", Keys, lambda a: a.port.keys()),
    Operation(
        "createKey", "POST", "/keys", CreatedKey, lambda a: a.port.create_key(a.body), NoQuery, NewKey, status=201
    ),
    Operation(
        "setKey", "PATCH", "/keys/{id}", KeyInfo, lambda a: a.port.set_key(a.path["id"], a.body), NoQuery, KeyChange
    ),
    Operation("revokeKey", "DELETE", "/keys/{id}", KeyInfo, lambda a: a.port.revoke_key(a.path["id"])),
    Operation("listBudgets", "GET", "/budgets", Budgets, lambda a: a.port.budgets()),
    Operation("setBudget", "POST", "/budgets", BudgetRow, lambda a: a.port.set_budget(a.body), NoQuery, NewBudget),
    Operation("removeBudget", "DELETE", "/budgets", BudgetRow, lambda a: a.port.remove_budget(a.query.id), BudgetQuery),
    Operation("listUsage", "GET", "/usage", UsagePage, lambda a: _usage(a), UsageQuery),
    Operation(
        "getUsageTotals",
        "GET",
        "/usage/totals",
        UsageTotals,
        lambda a: a.port.usage_totals(_filter(a.query), a.query.by),
        TotalsQuery,
    ),
    Operation("listDecisions", "GET", "/decisions", Decisions, lambda a: _decisions(a), DecisionsQuery),
    Operation("listScales", "GET", "/scale", Scales, lambda a: a.port.scales()),
    Operation("explainScale", "GET", "/scale/why", Choices, lambda a: _choices(a), WhyQuery),
    Operation(
        "setScale", "POST", "/scale/override", ScaleRow, lambda a: a.port.set_override(a.body), NoQuery, NewOverride
    ),
    Operation(
        "clearScale", "DELETE", "/scale/override", ScaleRow, lambda a: a.port.clear_override(a.query.model), ModelQuery
    ),
    Operation("listShadows", "GET", "/scale/shadows", Shadows, lambda a: _shadows(a), ShadowsQuery),
    Operation("listAdmins", "GET", "/admins", AdminList, lambda a: a.access.admins.list()),
    Operation(
        "createAdmin", "POST", "/admins", CreatedAdmin, lambda a: _create_admin(a), NoQuery, NewAdmin, status=201
    ),
    Operation("revokeAdmin", "DELETE", "/admins/{admin}", AdminInfo, lambda a: a.access.admins.revoke(a.path["admin"])),
    Operation("listAudit", "GET", "/audit", AuditPage, lambda a: _audit(a), AuditQuery),
    Operation("backup", "POST", "/backup", BackupReport, lambda a: a.port.backup(), status=201),
    Operation("down", "POST", "/down", DownReport, lambda a: _down(a), DownQuery, status=202),
)


def _filter(query: UsageFilter) -> UsageFilter:
    return UsageFilter(**{name: getattr(query, name) for name in UsageFilter.__struct_fields__})


async def _usage(a: Ask) -> UsagePage:
    _within("limit", a.query.limit, 1, 1000)
    return await a.port.usage(_filter(a.query), a.query.cursor, a.query.limit)


async def _decisions(a: Ask) -> Decisions:
    _within("limit", a.query.limit, 1, 500)
    return await a.port.decisions(a.query.limit)


async def _choices(a: Ask) -> Choices:
    _within("limit", a.query.limit, 1, 200)
    return await a.port.choices(a.query.model, a.query.limit)


async def _shadows(a: Ask) -> Shadows:
    _within("days", a.query.days, 1, 35)
    return await a.port.shadows(a.query.model, a.query.days)


async def _create_admin(a: Ask) -> CreatedAdmin:
    return await a.access.admins.create(a.body, a.who)


async def _audit(a: Ask) -> AuditPage:
    _within("limit", a.query.limit, 1, 1000)
    return await a.access.rows(a.query)


async def _down(a: Ask) -> DownReport:
    _within("grace_s", a.query.grace_s, 0, 3600)
    return await a.port.down(a.query.grace_s)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise AdminError(400, "E605", f"{name}={value:g} is out of range", fix=f"{low:g} to {high:g}")


# --- the app ----------------------------------------------------------------------------------------------------------


def build_app(
    control: ControlPort,
    access: Access,
    hosts: tuple[str, ...] = (),
    pages: tuple[BaseRoute, ...] | None = None,
    front: Front | None = None,
) -> Starlette:
    """The admin app; LookupError for a route that is not in NEEDS. `hosts`: names besides localhost and IP addresses by
    which browsers may reach it. `pages`: the documentation's routes; None for the built-in ones."""
    if pages is None:
        from neaptide.control.pages import routes

        pages = routes(control)
    api = [Route(f"/api/v1{op.path}", _endpoint(control, access, op), methods=[op.method]) for op in OPERATIONS]
    every = [Route("/health", _health), *api, *pages, *(front.routes() if front else ())]
    app = Starlette(
        routes=[access.gated(route) for route in every],
        exception_handlers={HTTPException: _http_error, NeaptideError: _known_error},
    )
    app.add_middleware(Guard, access=access, hosts=hosts, front=front)
    return app


def _endpoint(control: ControlPort, access: Access, op: Operation) -> Callable[[Request], Awaitable[Response]]:
    changes = bool(need_of(op.method, f"/api/v1{op.path}").action)

    async def endpoint(request: Request) -> Response:
        query, body, who = _query(request, op.query), await _body(request, op.body), request.scope[WHO]
        ask = Ask(control, dict(request.path_params), query, body, access, who)
        if not changes:
            return answer(await op.run(ask), op.status)
        request.state.note = note = await notes.before(op.id, ask)
        told = await op.run(ask)
        request.state.note = notes.after(note, told)
        return answer(told, op.status)

    return endpoint


def _query(request: Request, kind: type[T]) -> T:
    """Strict: unknown and repeated parameters, numbers that are none, NaN and infinities are refused."""
    pairs = request.query_params.multi_items()
    given = dict(pairs)
    if len(given) < len(pairs):
        raise AdminError(400, "E605", "a query parameter stands twice", fix="give it once")
    try:
        query = msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as e:
        names = ", ".join(kind.__struct_fields__) or "none"  # type: ignore[attr-defined]
        raise AdminError(400, "E605", f"the query is not valid: {e}", why=f"parameters here: {names}") from e
    for name, value in msgspec.structs.asdict(query).items():  # type: ignore[arg-type]
        if isinstance(value, float) and not math.isfinite(value):
            raise AdminError(400, "E605", f"{name}={value} is not a finite number")
    return query


async def _body(request: Request, kind: Any) -> Any:
    if kind is None:
        return None
    raw = await request.body()
    try:
        return raw.decode() if kind is str else msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise AdminError(400, "E605", f"the body is not valid: {e}", fix="see /docs") from e


async def _health(request: Request) -> Response:
    return answer({"status": "ok", "version": __version__})


async def _known_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, NeaptideError)  # noqa: S101  (what the handler is registered for)
    return failure(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return failure(AdminError(405, "E607", f"{request.method} is not allowed here", why=f"allowed: {allowed}"))
    return failure(AdminError(error.status_code, "E606", f"there is no {request.url.path}", fix="see /docs"))
