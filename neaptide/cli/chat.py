"""`neaptide chat`: talk to a model, one question or a conversation; what each answer took stands beneath it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from neaptide.cli import client
from neaptide.cli.draw import count, money, paint, span
from neaptide.cli.session import Session, common
from neaptide.cli.talk import Answer, Asked, ask, models
from neaptide.cli.words import language, say
from neaptide.errors import ConfigError, NeaptideError

if TYPE_CHECKING:
    from neaptide.cost.prices import PriceList

BUILT_IN = "guide"
CHIPS = Path(__file__).parent.parent / "models" / "guide" / "chips.json"
TOLD_AGAIN = ("hit", "shared", "stale")  # of x-neaptide-cache
MAX_QUESTION = 1 << 20  # characters read from a pipe


class Book(NamedTuple):
    """What answers cost."""

    prices: PriceList
    again: Mapping[str, int]  # by model, for an answer told from the cache: thousandths of the list price


class Place(NamedTuple):
    """Whom we talk to."""

    endpoint: client.Endpoint
    key: str
    timeout_s: float
    ours: bool  # the Neaptide of the state directory, not a --url


@click.command("chat", help=say("chat.help"))
@click.argument("question", nargs=-1)
@click.option("-m", "--model", help=say("chat.model"))
@click.option("--system", help=say("chat.system"))
@click.option("--max-tokens", type=click.IntRange(1), help=say("chat.max_tokens"))
@click.option("--temperature", type=click.FloatRange(0.0, 2.0), help=say("chat.temperature"))
@click.option("--url", help=say("chat.url"))
@click.option("--key", metavar="env:NAME|file:PATH", help=say("chat.key"))
@click.option("--timeout-s", type=click.FloatRange(0.1), default=300.0, show_default=True, help=say("chat.timeout"))
@common
def chat(
    session: Session, question: tuple[str, ...], model: str | None, system: str | None, max_tokens: int | None,
    temperature: float | None, url: str | None, key: str | None, timeout_s: float,
) -> None:  # fmt: skip
    place = _place(session, url, key, timeout_s)
    known = [model] if model else models(place.endpoint, place.key, timeout_s)
    if not known:
        raise NeaptideError(f"{place.endpoint} serves no models", fix="add one to neaptide.yaml", code="E612")
    how = Asked(known[0], max_tokens, temperature)
    talk = Conversation(session, place, how, system)
    text = " ".join(question) or _piped()
    if text:
        talk.once(text)
    else:
        talk.converse()


def _place(session: Session, url: str | None, key: str | None, timeout_s: float) -> Place:
    if url is not None:
        given = key or ("env:OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else "")
        return Place(client.Endpoint.of(url), _secret(session, given), timeout_s, False)
    api = client.Endpoint.of(client.running(session.state).api, client.api_leaf(session.state))
    return Place(api, _secret(session, key or f"file:{session.state / 'key'}"), timeout_s, True)


def _secret(session: Session, given: str) -> str:
    from neaptide.config import secret

    if given and not given.startswith(("env:", "file:")):
        session.note(say("chat.open_key"))  # other users of this machine can read argv
        return given
    return secret(given, "--key") if given else ""


def _piped() -> str:
    """The question on stdin, when stdin is not a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    text = sys.stdin.read(MAX_QUESTION + 1)
    if len(text) > MAX_QUESTION:
        raise ConfigError(f"more than {MAX_QUESTION} characters on stdin", fix="ask less at once", code="E110")
    if not text.strip():
        raise ConfigError("no question", fix='neaptide chat "..." or a terminal on stdin', code="E110")
    return text


def chips() -> list[str]:
    """Questions to begin with, in the language in force: those that came with the built-in model ({"en": [...], "zh":
    [...]}), else ours."""
    try:
        found = json.loads(CHIPS.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [say(f"chat.chip.{n}") for n in range(1, 4)]
    return [str(text) for text in found.get(language(), [])]


class Conversation:
    """Messages so far, and the verbs of the prompt."""

    def __init__(self, session: Session, place: Place, how: Asked, system: str | None) -> None:
        self.session, self.place, self.how = session, place, how
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._system)
        self._book: Book | None = None

    def once(self, text: str) -> None:
        """One question; the answer alone on stdout, the numbers on a terminal's stderr."""
        show = (lambda piece: None) if self.session.as_json else _show
        answer = self._answer(text, show)
        if self.session.as_json:
            self.session.data(self._as_dict(answer))
            return
        click.echo()
        if sys.stderr.isatty():
            self.session.note(self.numbers(answer))
        if not answer.finish:
            raise click.Abort

    def converse(self) -> None:
        """Read, answer, repeat, until /quit or the end of input. Ctrl-C ends the answer or clears the line."""
        import readline  # noqa: F401  (line editing and history for input())

        click.echo(self._greeting())
        while True:
            try:
                text = input(say("chat.prompt")).strip()
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo()
                continue
            if text.startswith("/"):
                if not self._command(text):
                    return
            elif text:
                self._turn(text)

    def _greeting(self) -> str:
        demo = f" ({say('chat.demo')})" if self.place.ours and self.how.model == BUILT_IN else ""
        lines = [f"{self.how.model}{demo} · {self.place.endpoint} · {say('chat.hint')}"]
        if demo:
            lines += [f"  · {chip}" for chip in chips()[:6]]
        return "\n".join(lines)

    def _turn(self, text: str) -> None:
        try:
            answer = self._answer(text, _show)
        except NeaptideError as e:  # one failed answer does not end the conversation
            click.echo()
            click.echo(str(e), err=True)
            return
        click.echo()
        click.echo(paint(self.numbers(answer), "", dim=True))

    def _command(self, text: str) -> bool:
        """Whether to go on."""
        verb, _, rest = text.partition(" ")
        if verb in ("/quit", "/exit", "/q"):
            return False
        if verb == "/reset":
            self.messages = list(self._system)
            click.echo(say("chat.reset"))
        elif verb == "/model":
            self._choose(rest.strip())
        else:
            click.echo(say("chat.commands"))
        return True

    def _choose(self, name: str) -> None:
        try:
            known = models(self.place.endpoint, self.place.key, self.place.timeout_s)
        except NeaptideError as e:
            click.echo(str(e), err=True)
            return
        if name in known:
            self.how = self.how._replace(model=name)
        elif name:
            click.echo(say("chat.no_model", name=name))
        click.echo("\n".join(f"{'*' if m == self.how.model else ' '} {m}" for m in known))

    def _answer(self, text: str, show: Any) -> Answer:
        """Ask with the conversation so far; question and answer join it only when something came back."""
        asked = [*self.messages, {"role": "user", "content": text}]
        place = self.place
        answer = ask(place.endpoint, place.key, self.how, asked, place.timeout_s, show)
        if answer.text:
            self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def numbers(self, a: Answer) -> str:
        """What was measured, in one line."""
        tokens = say("chat.tokens", prompt=count(a.prompt_tokens), output=count(a.output_tokens))
        parts = [f"TTFT {span(a.ttft_s)}", f"TPOT {span(a.tpot_s)}", tokens]
        amount, currency = self._cost(a)
        if amount is not None:
            parts.append(money(amount, currency))
        if not a.finish:
            parts.append(say("chat.aborted"))
        elif a.finish == "length":
            parts.append(say("chat.length"))
        return " · ".join(parts)

    def _cost(self, a: Answer) -> tuple[int | None, str]:
        """(nano-units or None, currency), by the prices in force when the conversation began; elsewhere unknown."""
        if not self.place.ours:
            return None, ""
        if self._book is None:
            self._book = book_of(self.session)
        return cost_nanos(a, self.how.model, self._book), self._book.prices.currency

    def _as_dict(self, a: Answer) -> dict[str, Any]:
        amount, currency = self._cost(a)
        return {"model": self.how.model, **a._asdict(), "amount_nanos": amount, "currency": currency or None}


def _show(piece: str) -> None:
    click.echo(piece, nl=False)
    sys.stdout.flush()


def book_of(session: Session) -> Book:
    """The prices in force; none when control does not tell: the answer is there, that is no reason to fail."""
    import msgspec

    from neaptide.config import Price
    from neaptide.control.port import ConfigView
    from neaptide.cost.prices import NO_PRICES, PriceList, rates
    from neaptide.cost.rate import MILLIS

    try:
        settings = client.admin(session.state, timeout_s=5.0).call("GET", "config", ConfigView).settings
    except NeaptideError:
        return Book(NO_PRICES, {})
    told = msgspec.convert(settings.get("prices", {}), dict[str, Price])
    models = msgspec.convert(settings.get("models", {}), dict[str, dict[str, Any]])
    again = {name: round(MILLIS * model.get("cache", {}).get("price", 0.0)) for name, model in models.items()}
    return Book(PriceList(0, 0.0, str(settings.get("currency", "")), rates(told)), again)


def cost_nanos(answer: Answer, model: str, book: Book) -> int | None:
    """What the ledger will charge for it; None without a price or counts."""
    from neaptide.cost.meter import charge
    from neaptide.cost.rate import MILLIS
    from neaptide.types import Usage

    if answer.prompt_tokens is None or answer.output_tokens is None:
        return None
    used = Usage(
        request_id=answer.request_id,
        model=model,
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        output_tokens=answer.output_tokens,
        price_millis=book.again.get(model, MILLIS) if answer.cache in TOLD_AGAIN else MILLIS,
    )
    charged = charge(used, book.prices)
    return None if charged is None else charged.amount_nanos
