"""Who is next: classes, tenants' shares in tokens as they are produced, deadlines, and who loses a place."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.errors import RequestError
from neaptide.gateway.queue import SPARED, Line, Ticket
from neaptide.gateway.shares import KEPT, PROMPT_BYTE, Shares
from tests.line_world import World, poisson

HIGH, NORMAL, LOW = 0, 1, 2


def entered(line: Line[str], *who: str, rank: int = NORMAL) -> list[Ticket[str]]:
    """Tickets named tenant:number."""
    return [line.enter(name, 0.0, tenant=name.partition(":")[0], rank=rank) for name in who]


def left(line: Line[str], now: float = 1.0, cost: float = 10.0) -> list[str]:
    """Everybody, in the order of leaving; each has had `cost` tokens at once."""
    found = []
    while (ticket := line.first(now)) is not None:
        ticket.account.charge(cost, ticket.rank)
        found.append(ticket.item)
    return found


# ------------------------------------------------------------------------------------------------ tenants


def test_tenants_take_turns_and_each_is_first_come_first_served() -> None:
    line: Line[str] = Line(100, 60)
    entered(line, "a:1", "a:2", "a:3", "a:4", "b:1", "b:2")
    assert left(line) == ["a:1", "b:1", "a:2", "b:2", "a:3", "a:4"]


def test_turns_are_counted_in_tokens_not_in_requests() -> None:
    line: Line[str] = Line(100, 60)
    entered(line, *(f"long:{i}" for i in range(4)), *(f"short:{i}" for i in range(8)))
    served = {"long": 0, "short": 0}
    for _ in range(6):
        ticket = line.first(1.0)
        assert ticket is not None
        tenant = ticket.account.tenant
        served[tenant] += 1
        ticket.account.charge(400 if tenant == "long" else 100, NORMAL)
    assert served == {"long": 2, "short": 4}


def test_a_tenant_of_twice_the_weight_has_twice_the_tokens() -> None:
    line: Line[str] = Line(1000, 60)
    line.shares.weigh({"gold": 2.0})
    entered(line, *(f"gold:{i}" for i in range(60)), *(f"tin:{i}" for i in range(60)))
    first = [name.partition(":")[0] for name in left(line)[:60]]
    assert first.count("gold") == pytest.approx(40, abs=1)


def test_a_pause_earns_nothing() -> None:
    line: Line[str] = Line(100, 60)
    entered(line, "busy:0", "back:0")
    left(line)
    entered(line, *(f"busy:{i}" for i in range(1, 40)))
    for _ in range(30):  # while the other one is away
        ticket = line.first(1.0)
        assert ticket is not None
        ticket.account.charge(100, NORMAL)
    entered(line, *(f"back:{i}" for i in range(1, 10)), *(f"busy:{i}" for i in range(40, 50)))
    order = [name.partition(":")[0] for name in left(line)[:10]]
    assert order.count("back") in (5, 6)


def test_who_uses_what_nobody_else_wants_is_not_punished_for_it() -> None:
    line: Line[str] = Line(100, 60)
    early, late = line.shares.of("early"), line.shares.of("late")
    for _ in range(50):
        line.passed(early, NORMAL)
        early.charge(1000, NORMAL)
    line.passed(late, NORMAL)
    late.charge(10, NORMAL)
    entered(line, "early:1", "early:2", "late:1", "late:2")
    assert sorted(left(line)[:2]) == ["early:1", "late:1"]


def test_tokens_count_as_they_are_produced() -> None:
    """Two requests were sent; whose answer has come is behind, though the other one asked for more."""
    line: Line[str] = Line(100, 60)
    entered(line, "quick:1", "slow:1")
    quick, slow = line.first(0.0), line.first(0.0)
    assert quick is not None
    assert slow is not None
    entered(line, "quick:2", "slow:2")
    quick.account.charge(500, NORMAL)
    slow.account.charge(20, NORMAL)
    assert left(line) == ["slow:2", "quick:2"]


def test_a_prompt_counts_a_tenth_of_its_tokens() -> None:
    assert pytest.approx(100) == 4000 * PROMPT_BYTE


def test_accounts_of_tenants_that_are_gone_do_not_pile_up() -> None:
    shares = Shares()
    here = shares.of("here")
    here.running = 1
    for i in range(10 * KEPT):
        shares.of(f"t{i}")
    assert len(shares) <= KEPT + 1
    assert shares.of("here") is here


# ------------------------------------------------------------------------------------------------ classes


def test_a_higher_class_goes_first_whoever_asks() -> None:
    line: Line[str] = Line(100, 60)
    entered(line, "a:low", rank=LOW)
    entered(line, "a:normal")
    entered(line, "b:high", rank=HIGH)
    assert left(line) == ["b:high", "a:normal", "a:low"]


def test_one_departure_in_sixteen_goes_to_the_lowest_so_that_none_waits_for_ever() -> None:
    line: Line[str] = Line(100, 60)
    entered(line, *(f"a:{i}" for i in range(40)), rank=HIGH)
    entered(line, "b:1", "b:2", "b:3", rank=LOW)
    order = left(line)
    assert [order.index(f"b:{i}") for i in (1, 2)] == [SPARED - 1, 2 * SPARED - 1]


def test_nor_does_the_class_between_two_that_never_stop() -> None:
    line: Line[str] = Line(10_000, 60)
    entered(line, *(f"a:{i}" for i in range(500)), rank=HIGH)
    entered(line, *(f"b:{i}" for i in range(100)))
    entered(line, *(f"c:{i}" for i in range(100)), rank=LOW)
    order = [name[0] for name in left(line)[:256]]
    assert (order.count("b"), order.count("c")) == (12, 4)


def test_a_class_that_a_tenant_fills_earns_it_nothing_in_another() -> None:
    """What was served in one class is not reckoned in another, nor is a low request that always waits a reserve."""
    line: Line[str] = Line(1000, 60)
    entered(line, "a:low", rank=LOW)
    day = line.shares.of("b")
    for _ in range(1000):
        line.passed(day, HIGH)
        day.charge(1000, HIGH)
    entered(line, *(f"a:{i}" for i in range(6)), *(f"b:{i}" for i in range(6)))
    order = [name[0] for name in left(line)[:10]]
    assert abs(order.count("a") - order.count("b")) <= 1


def test_who_lost_a_replica_is_before_all_classes() -> None:
    line: Line[str] = Line(100, 60)
    entered(line, "b:high", rank=HIGH)
    line.enter("a:again", 5.0, tenant="a", rank=LOW, since_s=0.0)
    assert left(line) == ["a:again", "b:high"]


def test_who_lost_a_replica_and_fits_nowhere_is_in_nobodys_way() -> None:
    line: Line[str] = Line(100, 60)
    line.enter("a:old", 5.0, tenant="a", since_s=0.0)
    line.enter("a:new", 5.0, tenant="a", since_s=0.0)
    entered(line, "b:1")
    assert line.lost
    order = []
    while (ticket := line.first(6.0, None, lambda item: item != "a:old")) is not None:
        order.append(ticket.item)
    assert order == ["a:new", "b:1"]
    assert [t.item for t in line.expired(60.0)] == ["a:old"]
    assert not line.lost


# ------------------------------------------------------------------------------------------------ a full line


def test_in_a_full_line_the_one_with_most_places_loses_its_last() -> None:
    line: Line[str] = Line(6, 60)
    entered(line, *(f"flood:{i}" for i in range(6)))
    out = line.crowded_out("victim", NORMAL)
    assert out is not None
    assert out.item == "flood:5"
    entered(line, "victim:1")
    assert line.crowded_out("flood", NORMAL) is None
    with pytest.raises(RequestError, match="6, 5 of them yours") as caught:
        line.enter("flood:9", 0.0, tenant="flood")
    assert caught.value.status == 429
    assert len(line) == 6


def test_in_a_line_over_its_cap_nobody_loses_a_place_for_nothing() -> None:
    line: Line[str] = Line(2, 60)
    entered(line, "flood:1", "flood:2")
    line.enter("flood:again", 0.0, tenant="flood", since_s=0.0)
    assert line.crowded_out("victim", NORMAL) is None
    assert len(line) == 3


def test_places_are_shared_until_nobody_has_two_more_than_another() -> None:
    line: Line[str] = Line(6, 60)
    entered(line, *(f"flood:{i}" for i in range(6)))
    for i in range(3):
        assert line.crowded_out("victim", NORMAL) is not None
        entered(line, f"victim:{i}")
    assert line.crowded_out("victim", NORMAL) is None


def test_a_higher_class_takes_the_place_of_a_lower_one_never_the_other_way() -> None:
    line: Line[str] = Line(2, 60)
    entered(line, "a:1", "a:2", rank=LOW)
    out = line.crowded_out("a", HIGH)
    assert out is not None
    assert out.item == "a:2"
    entered(line, "a:3", rank=HIGH)
    assert line.crowded_out("b", LOW) is None


# ------------------------------------------------------------------------------------------------ deadlines


def drained(line: Line[str], rate_per_s: float) -> float:
    """So many have left that the drain rate is known; the time now."""
    for i in range(20):
        entered(line, f"x:{i}")
        line.first(i / rate_per_s)
    return 20 / rate_per_s


def test_who_cannot_have_its_turn_in_time_is_refused_at_once_with_the_reason() -> None:
    line: Line[str] = Line(100, 60)
    now = drained(line, rate_per_s=2.0)
    entered(line, *(f"a:{i}" for i in range(9)))
    line.enter("a:patient", now, tenant="a", latest_s=now + 30)
    said = r"its turn in 5\.\d s; to make its deadline it had to be in 3\.0 s"
    with pytest.raises(RequestError, match=said) as caught:
        line.enter("a:hasty", now, tenant="a", latest_s=now + 3)
    assert (caught.value.status, caught.value.slug) == (429, "deadline_unreachable")
    line.enter("b:hasty", now, tenant="b", latest_s=now + 3)  # with its tenant's share it makes it


def test_time_in_which_nobody_waited_does_not_count_as_a_slow_line() -> None:
    line: Line[str] = Line(100, 60)
    drained(line, rate_per_s=2.0)
    entered_s = 3600.0
    line.enter("a:1", entered_s, tenant="a")
    line.enter("a:2", entered_s + 1, tenant="a", latest_s=entered_s + 4)


def test_where_nobody_knows_how_long_it_takes_nobody_is_refused_for_it() -> None:
    line: Line[str] = Line(100, 60)
    entered(line, *(f"a:{i}" for i in range(50)))
    assert line.enter("a:hasty", 0.0, tenant="a", latest_s=0.1).due_s == 0.1


def test_retry_after_knows_the_tenants_own_turn() -> None:
    line: Line[str] = Line(200, 600)
    now = drained(line, rate_per_s=2.0)
    entered(line, *(f"flood:{i}" for i in range(99)))
    assert line.retry_after_s(now, "flood") == pytest.approx(50, abs=1)
    assert line.retry_after_s(now, "victim") == 1.0


# ------------------------------------------------------------------------------------------------ whatever happens

STEPS = st.tuples(
    st.sampled_from(["enter", "again", "first", "leave", "expire", "crowd"]),
    st.sampled_from("abc"),
    st.integers(0, 2),
    st.integers(0, 30),
)


@given(st.lists(STEPS, max_size=120))
def test_a_line_holds_whom_it_let_in_until_they_leave(steps: list[tuple[str, str, int, int]]) -> None:
    line: Line[int] = Line(8, 25)
    inside: dict[int, Ticket[int]] = {}
    for now, (step, tenant, rank, n) in enumerate(steps):
        if step == "enter":
            refused = ""
            try:
                ticket = line.enter(now, now, tenant=tenant, rank=rank, latest_s=now + n if n > 20 else math.inf)
                inside[id(ticket)] = ticket
            except RequestError as e:
                refused = e.slug
            assert refused in ("", "deadline_unreachable") or len(inside) >= 8
        elif step == "again":
            ticket = line.enter(now, now, tenant=tenant, rank=rank, since_s=now - 1.0)
            inside[id(ticket)] = ticket
        elif step == "first":
            found = line.first(now)
            assert (found is None) == (not inside)
            if found is not None:
                found.account.charge(n, found.rank)
                del inside[id(found)]
        elif step == "leave" and inside:
            line.leave(inside.pop(list(inside)[n % len(inside)]))
        elif step == "crowd":
            out = line.crowded_out(tenant, rank)
            if out is not None:
                del inside[id(out)]
        else:
            for gone in line.expired(now):
                assert gone.due_s <= now
                del inside[id(gone)]
        assert len(line) == len(inside)
        for tenant in "abc":
            account = line.shares.of(tenant)
            assert account.waiting == sum(t.account is account for t in inside.values())
        oldest = min((t.entered_s for t in inside.values()), default=now)
        assert line.oldest_wait_s(now) == now - oldest


# ------------------------------------------------------------------------------------------------ over time


@pytest.mark.parametrize("seed", range(3))
def test_tenants_that_never_stop_have_equal_tokens(seed: int) -> None:
    # 4 slots, of which none is kept, make 200 tokens a second; `few` asks for 600, `many` for 2,000.
    world = World(slots=4).run(poisson("many", 20.0, 300, seed) + poisson("few", 6.0, 300, seed + 10), until_s=300)
    assert world.tokens["few"] == pytest.approx(world.tokens["many"], rel=0.05)


SLOTS = 8
RATE = SLOTS / (100 * 0.02)  # requests/s that the slots serve


def flooded(seed: int, share: float = 0.25, others: float = 10.0, until_s: float = 900.0) -> World:
    """A victim that asks for `share` of its half, beside one that asks for `others` times all there is."""
    victim = poisson("victim", share * RATE / 2, until_s, seed)
    return World(SLOTS).run(victim + poisson("flood", others * RATE, until_s, seed + 100), until_s=until_s)


@pytest.mark.parametrize(("share", "most"), [(0.25, 1.5), (0.5, 4.0)])
def test_a_victims_wait_is_about_the_time_to_the_next_free_slot_however_others_flood(share: float, most: float) -> None:
    """The nearer a tenant comes to its share, the more it waits for itself."""
    worlds = [flooded(seed, share) for seed in range(3)]
    ratios = sorted(world.p95_s("victim") / world.release_s for world in worlds)
    assert ratios[1] <= most


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_flood_costs_a_victim_no_more_than_others_who_take_their_fair_share(share: float) -> None:
    """The others' fair share at full load: all that the victim leaves."""
    more = []
    for seed in range(5):
        fair, flood = flooded(seed, share, others=1 - share / 2), flooded(seed, share)
        more.append(flood.p95_s("victim") - 1.1 * fair.p95_s("victim") - 0.1 * flood.release_s)
    assert sorted(more)[2] <= 0


def test_what_is_kept_free_costs_a_flood_at_most_one_slot_in_eight() -> None:
    alone = World(SLOTS).run(poisson("flood", 10 * RATE, 300, 1), until_s=300)
    beside = World(SLOTS).run(poisson("flood", 10 * RATE, 300, 1) + poisson("victim", 0.05, 300, 2), until_s=300)
    assert sum(beside.tokens.values()) >= (1 - 1 / SLOTS) * 0.98 * alone.tokens["flood"]
