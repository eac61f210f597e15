"""Who may do what on the admin listener: three roles, and the one table of its routes. No effects here.

A route that is not in NEEDS cannot be served: building the app fails. Who adds one says here which role it needs and,
where it changes something, what the audit log calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from neaptide.control.port import Answer, Ask

Role = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)  # each may what those before it may


class Who(NamedTuple):
    """The token behind a request; of a session the one that its link was made with."""

    id: str = ""
    name: str = ""
    role: Role | None = None  # None: nobody
    via: Literal["", "token", "link"] = ""


NOBODY = Who()
HOST = Who("host", "host", "admin", "token")  # who can read the state directory


class Need(NamedTuple):
    """What a route asks of who calls it."""

    least: Role | None  # None: open to everybody
    action: str = ""  # its name in the audit log; "": it changes nothing


OPEN, READ = Need(None), Need("viewer")
API = "/api/v1"
NEEDS: Mapping[tuple[str, str], Need] = {
    ("GET", "/health"): OPEN,
    ("GET", "/docs"): OPEN,
    ("GET", "/docs/{name}"): OPEN,
    ("GET", "/openapi.json"): OPEN,
    ("GET", "/openapi-inference.json"): OPEN,
    ("GET", f"{API}/status"): READ,
    ("POST", f"{API}/apply"): Need("admin", "apply"),
    ("GET", f"{API}/config"): READ,
    ("GET", f"{API}/models"): READ,
    ("GET", f"{API}/keys"): READ,
    ("POST", f"{API}/keys"): Need("admin", "createKey"),
    ("PATCH", f"{API}/keys/{{id}}"): Need("admin", "setKey"),
    ("DELETE", f"{API}/keys/{{id}}"): Need("admin", "revokeKey"),
    ("GET", f"{API}/budgets"): READ,
    ("POST", f"{API}/budgets"): Need("admin", "setBudget"),
    ("DELETE", f"{API}/budgets"): Need("admin", "removeBudget"),
    ("GET", f"{API}/usage"): READ,
    ("GET", f"{API}/usage/totals"): READ,
    ("GET", f"{API}/decisions"): READ,
    ("GET", f"{API}/scale"): READ,
    ("GET", f"{API}/scale/why"): READ,
    ("POST", f"{API}/scale/override"): Need("operator", "setScale"),
    ("DELETE", f"{API}/scale/override"): Need("operator", "clearScale"),
    ("GET", f"{API}/scale/shadows"): READ,
    ("GET", f"{API}/admins"): READ,
    ("POST", f"{API}/admins"): Need("admin", "createAdmin"),
    ("DELETE", f"{API}/admins/{{admin}}"): Need("admin", "revokeAdmin"),
    ("GET", f"{API}/audit"): READ,
    ("POST", f"{API}/backup"): Need("admin", "backup"),
    ("POST", f"{API}/down"): Need("admin", "down"),
    # the dashboard
    ("GET", "/"): Need(None, "signIn"),  # asks for a session by itself; a ticket begins one
    ("POST", "/ui/ticket"): Need("viewer", "createLink"),
    ("GET", "/ui/session"): READ,
    ("DELETE", "/ui/session"): Need("viewer", "signOut"),
    ("GET", "/ui/live"): READ,
    ("GET", "/ui/history"): READ,
    ("POST", "/ui/play"): Need("operator"),  # spends money and changes nothing: its row is the ledger's
    ("GET", "/ui/{name:path}"): OPEN,  # the page's files; the guard asks for a session where there is none of that name
}


def need_of(method: str, path: str) -> Need:
    """What NEEDS says of a route. LookupError for one that it does not know."""
    if (need := NEEDS.get((method, path))) is None:
        raise LookupError(f"{method} {path} is not in NEEDS: say in control/roles.py who may use it")
    return need


def may(role: Role | None, least: Role | None) -> bool:
    """Whether a role is enough."""
    return least is None or (role is not None and ROLES.index(role) >= ROLES.index(least))


# --- what the admin API says of tokens --------------------------------------------------------------------------------


class AdminInfo(Answer, frozen=True):
    id: str
    name: str
    role: Role
    tail: str  # the token's last four characters; "" of the host's own
    created_wall_s: float
    made_by: str  # id of the token that made it
    revoked: bool


class NewAdmin(Ask, frozen=True):
    role: Role
    name: str = ""


class CreatedAdmin(Answer, frozen=True):
    token: str  # shown here and never again
    info: AdminInfo


class AdminList(Answer, frozen=True):
    rows: tuple[AdminInfo, ...]
