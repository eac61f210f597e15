"""`neaptide demo`: a compressed day on a real service, narrated; a bill and a page at its end."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import msgspec

from neaptide.cli import client
from neaptide.cli.draw import paint, span
from neaptide.cli.session import Session, common
from neaptide.cli.words import language, say
from neaptide.control.reasons import price
from neaptide.demo.bill import Bill, bill
from neaptide.demo.play import Doors, play
from neaptide.demo.records import Decided, Killed
from neaptide.demo.story import CURRENCY, MOST, PRICE, Story, story
from neaptide.demo.visit import Open
from neaptide.demo.watch import Ask
from neaptide.errors import ConfigError
from neaptide.types import PolicyName

ANSWER_S = 90.0
T = TypeVar("T")


@click.command("demo", help=say("demo.help"))
@click.option("--short", is_flag=True, help=say("demo.short"))
@click.option("--policy", type=click.Choice(get_args(PolicyName)), default="thresholds", show_default=True,
              help=say("demo.policy"))  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help=say("demo.seed"))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="neaptide-demo.html", show_default=True,
              help=say("demo.out"))  # fmt: skip
@common
def demo(session: Session, short: bool, policy: str, seed: int, out: Path) -> None:
    told = story(short=short, seed=seed, policy=policy)
    _writable(out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the service must not outlive us
    narrator = Narrator(session, told)
    played = play(told, Doors(ask=_asker, opens=_opener), narrator.tell)
    made = bill(played)
    from neaptide.demo.page import page

    _write(out, page(played, made, language()))
    if session.as_json:
        more = {"saved": made.saved, "kept": made.kept, "page": str(out.absolute())}
        session.data({**msgspec.to_builtins(made), "decided": msgspec.to_builtins(played.seen.decided), **more})
    else:
        click.echo("\n".join([*summary(made), "", say("demo.page", path=out.absolute())]))
    if not made.kept:
        sys.exit(1)


def _asker(state: Path) -> Ask:
    admin = client.own(state, timeout_s=10.0)

    def ask(path: str, kind: type[T], query: dict[str, Any]) -> T:
        return admin.call("GET", path, kind, query=query)

    return ask


def _opener(api: str, key: str) -> Open:
    endpoint = client.Endpoint.of(api)
    return lambda body: client.Stream(endpoint, "/chat/completions", body, key, ANSWER_S)


def _writable(out: Path) -> None:
    """Said before the day is played, not after it."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(
            f"{out} cannot be written", why=f"{out.parent} is no directory", code="E110", fix="--out FILE"
        )


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{out} cannot be written", why=e.strerror or "", code="E110", fix="--out FILE") from e


class Narrator:
    """Says what happens as it does: on stdout, or on stderr with --json."""

    def __init__(self, session: Session, told: Story) -> None:
        self._session, self._story = session, told

    def tell(self, kind: str, values: dict[str, Any]) -> None:
        line = getattr(self, f"_{kind}")(**values)
        for text in line if isinstance(line, list) else [line]:
            click.echo(text, err=self._session.as_json)

    def _at(self, at_s: float, text: str) -> str:
        return f"{paint(self._story.hour(at_s), '', dim=True)}  {text}"

    def _start(self) -> list[str]:
        lines = [paint(say("demo.title"), "", bold=True)]
        lines.append(say("demo.setting", most=MOST, price=price(PRICE, CURRENCY), seconds=self._story.end_s))
        lines.append(say("demo.rules") if self._story.policy == "thresholds" else
                     say("demo.chosen", policy=self._story.policy))  # fmt: skip
        return [*lines, ""]

    def _ready(self, seconds: float, api: str) -> str:
        return f"       {say('demo.ready', seconds=span(seconds), api=api)}"

    def _scene(self, name: str, at_s: float) -> str:
        return self._at(at_s, paint(say(f"demo.scene.{name}"), "cyan", bold=True))

    def _decided(self, decided: Decided) -> str:
        mark = paint("+", "green") if decided.after > decided.before else paint("-", "yellow")
        return self._at(decided.at_s, f"{mark} {decided.said[language()]}")

    def _traffic(self, at_s: float, rate: float, replicas: int, ttft_s: float) -> str:
        text = say("demo.traffic", rate=f"{rate:.1f}", replicas=replicas, ttft=span(ttft_s))
        return self._at(at_s, paint(f"  {text}", "", dim=True))

    def _kill(self, killed: Killed) -> str:
        text = say("demo.kill", replica=killed.replica, pid=killed.pid, n=killed.running)
        return self._at(killed.at_s, f"{paint('✗', 'red')} {text}")

    def _back(self, killed: Killed) -> str:
        text = say("demo.back", seconds=span((killed.back_s or killed.at_s) - killed.at_s))
        return self._at(killed.back_s or killed.at_s, f"{paint('✓', 'green')} {text}")

    def _count(self) -> str:
        return f"       {say('demo.count')}"

    def _stop(self) -> list[str]:
        return [f"       {say('demo.stop')}", ""]


def summary(made: Bill) -> list[str]:
    """The bill, and what was promised."""

    def money(amount: float) -> str:
        return price(amount, made.currency)

    share = "-" if made.attainment is None else f"{made.attainment:.1%}"
    lines = [paint(say("demo.bill"), "", bold=True)]
    lines.append(say("demo.bill.requests", sent=made.sent, answered=made.answered, held=made.held, failed=made.failed,
                     moved=made.moved))  # fmt: skip
    lines.append(say("demo.bill.latency", p50=span(made.ttft_p50_s), p95=span(made.ttft_p95_s), share=share,
                     goal=f"{made.goal:.0%}"))  # fmt: skip
    lines.append(say("demo.bill.replicas", hours=f"{made.replica_s / 3600:.3f}", cost=money(made.cost)))
    lines.append(
        say("demo.bill.fixed", peak=made.peak, hours=f"{made.fixed_s / 3600:.3f}", cost=money(made.fixed_cost))
    )
    lines.append(paint(say("demo.bill.saved", share=f"{made.saved:.0%}", day=money(made.a_day(made.cost)),
                           fixed=money(made.a_day(made.fixed_cost))), "", bold=True))  # fmt: skip
    return [*lines, "", *map(_promise, made.promises)]


def _promise(promise: Any) -> str:
    mark = paint("✓", "green") if promise.kept else paint("✗", "red")
    values = {k: span(v) if k == "seconds" else v for k, v in promise.values.items()}
    return f"{mark} {say(f'demo.promise.{promise.name}', **values)}"
