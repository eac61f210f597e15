"""What the audit log says of a change of the API: on what, and what was and is, in short and without secrets.

Two looks, before and after. An operation without words of its own is told by its path, its model or name, and the
fields of its body that are not the defaults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from neaptide.control.chain import Note
from neaptide.control.port import ApplyReport, BackupReport, BudgetRow, CreatedKey, DownReport, KeyInfo, ScaleRow
from neaptide.control.roles import AdminInfo, CreatedAdmin
from neaptide.cost.prices import NANOS

if TYPE_CHECKING:
    from neaptide.control.admin import Ask


async def before(action: str, ask: Ask) -> Note:
    """What is known ahead; all that is known where the change fails."""
    object = next(iter(ask.path.values()), "") or _named(ask.body) or _named(ask.query)
    note = Note(object, after=_fields(ask.body))
    if action in ("setScale", "clearScale"):
        rows = (await ask.port.scales()).rows
        row = next((r for r in rows if object in (r.model, *r.members)), None)
        return note._replace(before=_scale(row) if row else "")
    if action == "revokeKey":
        found = next((k for k in (await ask.port.keys()).rows if k.id == object), None)
        return note._replace(before=_state(found.disabled) if found else "")
    if action == "setKey":
        found = next((k for k in (await ask.port.keys()).rows if k.id == object), None)
        return note._replace(before=_json({name: getattr(found, name) for name in _told(ask.body)}) if found else "")
    if action in ("setBudget", "removeBudget"):
        id = f"{ask.body.scope}:{ask.body.unit}:{ask.body.period}" if action == "setBudget" else ask.query.id
        budget = next((r for r in (await ask.port.budgets()).rows if r.id == id), None)
        return note._replace(object=id, before=_json({"amount": _amount(budget)}) if budget else "")
    if action == "revokeAdmin":
        admin = next((r for r in (await ask.access.admins.list()).rows if r.id == object), None)
        return note._replace(before=_state(admin.revoked) if admin else "")
    return note


def after(note: Note, answer: Any) -> Note:
    """The note with what the answer tells."""
    match answer:
        case CreatedKey() | CreatedAdmin():
            return note._replace(object=answer.info.id)
        case KeyInfo():
            return note if note.after else note._replace(after=_state(answer.disabled))
        case BudgetRow():
            return note._replace(object=answer.id)
        case AdminInfo():
            return note._replace(after=_state(answer.revoked))
        case ScaleRow():
            return note._replace(after=_scale(answer))
        case ApplyReport():
            return note._replace(after=_difference(answer))
        case BackupReport():
            return note._replace(object=answer.path, after=f"{answer.bytes} bytes, sha256 {answer.sha256}")
        case DownReport():
            return note._replace(after=f"{answer.grace_s:g} s of grace")
        case _:
            return note


def _named(asked: Any) -> str:
    names = (getattr(asked, name, "") for name in ("id", "model", "name", "origin"))
    return next((name for name in names if isinstance(name, str) and name), "")


def _fields(body: Any) -> str:
    """A struct's fields that differ from their defaults, as JSON; nothing of a text."""
    return _json(_told(body)) if isinstance(body, msgspec.Struct) else ""


def _told(body: msgspec.Struct) -> dict[str, Any]:
    told = {}
    for field in msgspec.structs.fields(body):
        value = getattr(body, field.name)
        if value != field.default:
            told[field.encode_name] = value
    return told


def _json(told: Any) -> str:
    return msgspec.json.encode(told).decode()


def _amount(row: BudgetRow) -> float:
    """As it is asked for: of the currency, or tokens."""
    return row.amount / NANOS if row.unit == "money" else row.amount


def _state(gone: bool) -> str:
    return "revoked" if gone else "active"


def _scale(row: ScaleRow) -> str:
    if row.override is None:
        return f"{row.wanted} by {row.policy}"
    return f"{row.override.count} until {row.override.until_wall_s:.0f} by hand of {row.override.by or 'somebody'}"


def _difference(report: ApplyReport) -> str:
    signs = (("+", report.added), ("~", report.changed), ("-", report.removed))
    told = ["dry run"] if report.dry_run else []
    told += [sign + name for sign, names in signs for name in names]
    told += [f"{c.key}: {c.old or 'absent'} -> {c.new or 'absent'}" for c in report.changes]
    return "; ".join(told) or "nothing differs"
