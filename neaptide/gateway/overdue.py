"""What time does to a request: heartbeats while it waits, and the limits that end it. The door's sweep asks."""

from __future__ import annotations

from neaptide.errors import RequestError
from neaptide.gateway.exchange import OPEN, WAITING, Exchange
from neaptide.link import STALL_S

HEARTBEAT_S = 5.0  # a stream that waits hears from us so often
LEAVING_S = 5.0  # how long a link's replica has to tell what an aborted request cost


def check(exchange: Exchange, now: float) -> None:
    """Is anything of it overdue at `now`?"""
    if exchange.state == WAITING:
        if exchange.ticket is None and now >= exchange.deadline_s:  # in no line that would see to it
            _late(exchange, "deadline_exceeded", "its deadline passed", now)
        elif exchange.asked.stream and now - exchange.state_s >= HEARTBEAT_S:
            exchange.beat(now)
    elif exchange.state <= OPEN:
        _check_running(exchange, now)
    elif now - exchange.state_s > LEAVING_S:
        exchange.left(now)


def _check_running(exchange: Exchange, now: float) -> None:
    """Of a replica that has it."""
    timeouts = exchange.timeouts
    if now >= exchange.deadline_s:
        _late(exchange, "deadline_exceeded", "its deadline passed", now)
    elif now - exchange.sent_s > timeouts.total_s:
        _late(exchange, "total_timeout", f"it took longer than {timeouts.total_s:g} s", now)
    elif exchange.paused_s:
        if now - exchange.paused_s > STALL_S:  # the client reads nothing: it holds a slot for nothing
            exchange.connection.abort()
    elif exchange.state_s == exchange.sent_s:
        if now - exchange.sent_s > timeouts.first_byte_s:
            why = f"the replica said nothing for {timeouts.first_byte_s:g} s"
            _late(exchange, "first_byte_timeout", why, now)
    elif now - max(exchange.state_s, exchange.timing.last_s) > timeouts.idle_s:
        _late(exchange, "idle_timeout", f"the replica fell silent for {timeouts.idle_s:g} s", now)


def _late(exchange: Exchange, slug: str, why: str, now: float) -> None:
    exchange.fail(RequestError(504, f"The request was stopped: {why}.", slug=slug), now, "timeout")
