"""`neaptide budgets`: what keys, projects, tenants or all together may spend in a day, a month, or ever."""

from __future__ import annotations

import click
import msgspec

from neaptide.cli import client
from neaptide.cli.draw import count, moment, money, table
from neaptide.cli.session import Session, common
from neaptide.cli.words import say
from neaptide.control.port import BudgetRow, Budgets, NewBudget


@click.group("budgets", no_args_is_help=False, help=say("budgets.help"))
def budgets() -> None:
    pass


@budgets.command("list", help=say("budgets.list"))
@common
def list_budgets(session: Session) -> None:
    found = client.admin(session.state).call("GET", "budgets", Budgets)
    if session.as_json:
        session.encoded(found)
        return
    columns = ("id", "amount", "spent", "lent", "left", "renews")
    table("", [say(f"budgets.col.{c}") for c in columns], [_row(row, found.currency) for row in found.rows])


def _row(row: BudgetRow, currency: str) -> list[str]:
    amounts = (row.amount, row.spent, row.lent, row.left)
    shown = [money(a, currency) if row.unit == "money" else count(a) for a in amounts]
    return [row.id, *shown, moment(row.renews_wall_s or 0.0)]


@budgets.command("set", help=say("budgets.set"))
@click.argument("scope", metavar="SCOPE")
@click.option("--money", "money_amount", type=float, help=say("budgets.opt.money"))
@click.option("--tokens", type=int, help=say("budgets.opt.tokens"))
@click.option(
    "--period",
    type=click.Choice(["day", "month", "total"]),
    default="month",
    show_default=True,
    help=say("budgets.opt.period"),
)
@click.option("--strict", is_flag=True, help=say("budgets.opt.strict"))
@common
def set_budget(
    session: Session, scope: str, money_amount: float | None, tokens: int | None, period: str, strict: bool
) -> None:
    if (money_amount is None) == (tokens is None):
        raise click.UsageError(say("budgets.either"))
    unit, amount = ("money", money_amount) if money_amount is not None else ("tokens", tokens)
    asked = {"scope": scope, "unit": unit, "amount": amount, "period": period, "strict": strict}
    body = msgspec.json.encode(msgspec.convert(asked, NewBudget))
    made = client.admin(session.state).call("POST", "budgets", BudgetRow, body=body)
    if session.as_json:
        session.encoded(made)
    else:
        click.echo(say("budgets.is_set", id=made.id))


@budgets.command("remove", help=say("budgets.remove"))
@click.argument("budget_id", metavar="ID")
@common
def remove(session: Session, budget_id: str) -> None:
    gone = client.admin(session.state).call("DELETE", "budgets", BudgetRow, query={"id": budget_id})
    if session.as_json:
        session.encoded(gone)
    else:
        click.echo(say("budgets.gone", id=gone.id))
