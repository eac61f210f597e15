"""The gateway's decisions, which are pure: who may come in, who waits, who goes where."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.errors import RequestError
from neaptide.gateway import admit, ids
from neaptide.gateway.admit import ANYBODY, Keys
from neaptide.gateway.metrics import Metrics
from neaptide.gateway.queue import Line, too_long
from neaptide.gateway.record import Timing
from neaptide.gateway.repeat import learn, whole_chunks
from neaptide.gateway.route import SCANNED, Target, choose
from neaptide.gateway.sse import TAIL_BYTES, Counts, HideUsage, finish, of_answer, usage
from neaptide.link import LoadReport
from neaptide.observe.histogram import Histogram
from neaptide.table import ReplicaRow
from tests.gateway_kit import PEPPER, key_row

SALT = bytes.fromhex(PEPPER)
NOW_S = 1_790_000_000.0  # wall time


def refusal(call, *args) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args)
    return caught.value


# --- admit


def test_a_key_is_found_by_its_keyed_hash_and_remembered():
    row = key_row("sk-a", tenant="t")
    keys = Keys([row, key_row("sk-b")], SALT)
    assert keys.find(b"Bearer sk-a", NOW_S) is row
    assert keys.find(b"bearer  sk-a", NOW_S) is row
    assert keys.find(b"Bearer sk-a", NOW_S) is row


@pytest.mark.parametrize(
    ("header", "slug"),
    [
        (None, "missing_api_key"),
        (b"", "invalid_api_key"),
        (b"Bearer", "invalid_api_key"),
        (b"Bearer ", "invalid_api_key"),
        (b"Basic sk-a", "invalid_api_key"),
        (b"Bearer sk-unknown", "invalid_api_key"),
        (b"Bearer \xff\xfe", "invalid_api_key"),
        (b"Bearer sk-off", "disabled_api_key"),
    ],
)
def test_other_authorization_is_401(header: bytes | None, slug: str):
    keys = Keys([key_row("sk-a"), key_row("sk-off", disabled=True)], SALT)
    error = refusal(keys.find, header, NOW_S)
    assert (error.status, error.slug) == (401, slug)


def test_with_auth_off_anybody_is_served():
    assert Keys([], SALT, required=False).find(None, NOW_S) is ANYBODY


def test_rejected_keys_are_never_remembered():
    keys = Keys([key_row("sk-a")], SALT)
    for i in range(100):
        refusal(keys.find, b"Bearer no-%d" % i, NOW_S)
    assert len(keys._seen) == 0


def test_an_expired_key_is_refused_from_its_second_on_and_forgotten():
    keys = Keys([key_row("sk-a", expires_wall_s=NOW_S)], SALT)
    assert keys.find(b"Bearer sk-a", NOW_S - 0.001).id == "id-a"
    for wall_s in (NOW_S, NOW_S + 1e6):
        error = refusal(keys.find, b"Bearer sk-a", wall_s)
        assert (error.status, error.slug) == (401, "expired_api_key")
        assert "2026-09-21 14:13:20+00:00" in error.what
        assert len(keys._seen) == 0


def test_a_key_may_be_bound_to_scopes():
    admit.check_scope(key_row(), "models")
    admit.check_scope(key_row(scopes=("models", "inference")), "models")
    error = refusal(admit.check_scope, key_row(scopes=("inference", "tokenize")), "models")
    assert (error.status, error.slug) == (403, "scope_not_allowed")
    assert "'models'" in error.what
    assert "inference, tokenize" in error.what


def test_a_key_may_be_bound_to_models():
    admit.check_model(key_row(), "m")
    admit.check_model(key_row(models=("m",)), "m")
    assert refusal(admit.check_model, key_row(models=("m",)), "other").status == 403


@pytest.mark.parametrize(
    ("asked", "highest", "given"),
    [
        (None, "high", "normal"),
        (None, "low", "low"),
        (b"high", "normal", "normal"),
        (b"HIGH", "high", "high"),
        (b"low", "high", "low"),
    ],
)
def test_priority_is_clamped_by_the_key(asked: bytes | None, highest: str, given: str):
    assert admit.priority(asked, key_row(priority=highest)) == given


def test_an_unknown_priority_is_refused():
    assert refusal(admit.priority, b"urgent", key_row()).status == 400


def test_deadlines_come_from_the_header_and_from_the_sdk_when_nothing_streams():
    ours, sdk = {b"x-neaptide-deadline-ms": b"1500"}, {b"x-stainless-read-timeout": b"600.5"}
    assert admit.deadline_s({}, False, 10.0) == math.inf
    assert admit.deadline_s(ours, True, 10.0) == 11.5
    assert admit.deadline_s(sdk, False, 10.0) == 610.5
    assert admit.deadline_s(sdk, True, 10.0) == math.inf
    assert admit.deadline_s({**ours, **sdk}, False, 10.0) == 11.5


@pytest.mark.parametrize("value", [b"", b"0", b"-5", b"1.5", b"abc", b"9" * 40])
def test_a_malformed_deadline_is_refused(value: bytes):
    assert refusal(admit.deadline_s, {b"x-neaptide-deadline-ms": value}, False, 0.0).status == 400


@pytest.mark.parametrize("value", [b"None", b"NOT_GIVEN", b"", b"-1", b"inf", b"0"])
def test_an_sdk_without_a_timeout_sets_no_deadline(value: bytes):
    assert admit.deadline_s({b"x-stainless-read-timeout": value}, False, 0.0) == math.inf


# --- queue


def test_a_line_is_first_in_first_out():
    line: Line[str] = Line(10, 60)
    for name in "abc":
        line.enter(name, 0.0)
    assert [t.item for t in iter(lambda: line.first(1.0), None)] == ["a", "b", "c"]
    assert len(line) == 0


def test_a_full_line_refuses_with_the_drain_rate():
    line: Line[int] = Line(20, 60)
    for i in range(20):
        line.enter(i, 0.0)
    assert refusal(line.enter, 21, 0.0).retry_after_s == 60
    for i in range(10):
        line.first(i * 0.5)
        line.enter(i, i * 0.5)
    error = refusal(line.enter, 21, 5.0)
    assert (error.status, error.slug) == (429, "queue_full")
    assert error.retry_after_s == 11  # 21 places at 2 a second


def test_a_ticket_expires_by_the_longest_wait_or_its_own_deadline():
    line: Line[str] = Line(10, 30)
    line.enter("patient", 0.0)
    line.enter("hasty", 1.0, latest_s=5.0)
    assert line.expired(4.9) == []
    (hasty,) = line.expired(5.0)
    assert (hasty.item, too_long(hasty, 2.0).slug) == ("hasty", "deadline_passed")
    (patient,) = line.expired(30.0)
    assert (patient.item, too_long(patient, 2.0).slug) == ("patient", "wait_expired")
    assert len(line) == 0


def test_who_lost_its_replica_waits_at_the_front_and_keeps_its_clock():
    line: Line[str] = Line(1, 30)
    line.enter("new", 10.0)
    line.enter("again", 10.0, since_s=2.0)  # past the cap: it was let in before
    assert line.oldest_wait_s(10.0) == 8.0
    ticket = line.first(10.0)
    assert ticket is not None
    assert (ticket.item, ticket.due_s) == ("again", 32.0)


def test_abandoned_tickets_do_not_pile_up():
    line: Line[int] = Line(10_000, 1e9)
    line.enter(-1, 0.0)
    for i in range(5000):
        line.leave(line.enter(i, 0.0))
    assert len(line._dues) < 500
    assert len(line._ranks[1].queues[""].tickets) < 500


# --- route


def targets(*rows: dict) -> list[Target]:
    return [Target(ReplicaRow(id=f"r{i}", model="m", endpoint="http://x", **row)) for i, row in enumerate(rows)]


def test_the_least_loaded_replica_is_chosen_and_ties_go_round():
    three = targets({}, {}, {})
    assert [choose(three, 0.0, turn).row.id for turn in range(3)] == ["r0", "r1", "r2"]
    three[0].take()
    three[1].take()
    assert choose(three, 0.0, 0).row.id == "r2"


def test_full_draining_and_failing_replicas_are_left_out():
    full, leaving, failing = targets({"max_running": 1}, {"state": "draining"}, {})
    full.take()
    failing.failed(10.0)
    assert choose([full, leaving, failing], 10.1) is None
    assert choose([full, leaving, failing], 10.0 + 0.25) is failing
    full.release()
    assert choose([full, leaving, failing], 10.1) is full


def test_a_replica_that_was_tried_is_tried_again_only_without_another():
    one, two = targets({}, {})
    two.take()
    assert choose([one, two], 0.0, avoid=["r0"]) is two
    assert choose([one], 0.0, avoid=["r0"]) is one


@given(
    st.lists(st.sampled_from(["busy", "idle", "full", "leaving", "down"]), max_size=3 * SCANNED),
    st.integers(0, 1 << 40),
    st.sets(st.integers(0, 3 * SCANNED)),
)
def test_whatever_is_looked_at_somebody_who_can_take_it_is_found_and_who_was_tried_comes_last(
    kinds: list[str], turn: int, tried: set[int]
) -> None:
    rows = {"full": {"max_running": 0}, "leaving": {"state": "draining"}}
    many = targets(*(rows.get(kind, {}) for kind in kinds))
    for target, kind in zip(many, kinds, strict=True):
        target.in_flight = 5 if kind == "busy" else 0
        if kind == "down":
            target.failed(10.0)
    avoid = [f"r{at}" for at in tried]
    able = [t for t in many if t.can_take(10.1)]
    untried = [t for t in able if t.row.id not in avoid]
    found = choose(many, 10.1, turn, avoid)
    assert (found is None) == (not able)
    assert found is None or found in (untried or able)
    if len(many) <= SCANNED and untried:
        assert found is not None
        assert found.in_flight == min(t.in_flight for t in untried)


def test_among_many_replicas_no_one_gets_far_more_than_the_mean() -> None:
    many = targets(*({} for _ in range(8 * SCANNED)))
    for turn in range(10 * len(many)):
        target = choose(many, 0.0, turn)
        assert target is not None
        target.take()
    assert max(t.in_flight for t in many) <= 13
    assert min(t.in_flight for t in many) >= 6


def test_a_linked_replica_takes_what_it_reported_less_what_was_sent_since():
    target = Target(ReplicaRow(id="r", model="m", endpoint="link:/x"))
    assert not target.can_take(0.0)
    target.connected = True
    assert not target.can_take(0.0)
    target.heard(LoadReport(slots=2))
    target.take()
    assert target.can_take(0.0)
    target.take()
    assert not target.can_take(0.0)
    target.release()
    assert target.can_take(0.0)
    target.heard(LoadReport(slots=5, draining=True))
    assert not target.can_take(0.0)


def test_a_replica_that_refused_for_want_of_room_is_given_nothing_until_one_ends_or_it_reports() -> None:
    target = Target(ReplicaRow(id="r", model="m", endpoint="link:/x"))
    target.connected = True
    target.heard(LoadReport(slots=4, rooms={"m": 4}))  # crossed four requests that were on their way
    target.take()
    target.release()  # it is refused
    target.filled()
    assert not target.can_take(0.0, "m")
    target.release()  # one that it had taken before ends
    assert target.can_take(0.0, "m")
    target.filled()
    target.heard(LoadReport(slots=1))
    assert target.can_take(0.0, "m")


# --- ids, timing, metrics


def test_ids_are_in_time_order_even_when_the_clock_steps_back():
    make = ids.Ids()
    made = [make.next(1_700_000_000.0 + t) for t in (0.0, 0.0, 0.5, 0.1, 0.0, 9.0)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)
    assert {len(i) for i in made} == {26}


def test_ids_of_one_millisecond_are_ordered_and_distinct():
    make = ids.Ids()
    made = [make.next(1.0) for _ in range(5000)]
    assert made == sorted(made)
    assert len(set(made)) == 5000


@given(st.binary(max_size=140))
def test_only_printable_client_ids_are_echoed(value: bytes):
    assert ids.client_id(value) in (b"", value)
    if ids.client_id(value):
        assert value.isascii()
        assert b" " not in value
        assert len(value) <= 128


def test_timing_keeps_first_token_gaps_and_pace():
    timing = Timing()
    for now in (10.0, 10.1, 10.5, 10.6):
        timing.mark(now, 1)
    assert timing.first_s == 10.0
    assert timing.itl_max_s == pytest.approx(0.4)
    assert timing.tpot_s(timing.tokens) == pytest.approx(0.2)
    assert Timing().tpot_s(0) == 0.0


def test_a_histogram_is_cumulative_at_scrape():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)
    lines = list(histogram.lines("x", 'm="a"'))
    assert lines[:3] == ['x_bucket{m="a",le="0.1"} 2', 'x_bucket{m="a",le="1.0"} 3', 'x_bucket{m="a",le="+Inf"} 4']
    assert lines[-1] == 'x_count{m="a"} 4'


def test_label_values_are_escaped():
    metrics = Metrics('1"\n\\')
    assert b'neaptide_build_info{version="1\\"\\n\\\\"} 1' in metrics.render([])


# --- the same head again

HEAD = b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: %b\r\nAuthorization: Bearer k\r\n\r\n"


def test_a_head_is_known_again_whatever_the_length_of_its_body():
    known = learn(HEAD % b"5" + b"hello")
    assert known is not None
    for body in (b"", b"x", b"y" * 12345):
        assert known.body(HEAD % str(len(body)).encode() + body) == body


@pytest.mark.parametrize(
    "data",
    [
        HEAD % b"5" + b"hell",
        HEAD % b"5" + b"hello!",
        HEAD % b"+5" + b"hello",
        HEAD % b" 5" + b"hello",
        HEAD % b"05" + b"hello",
        HEAD % b"" + b"",
        HEAD % b"5\r\nContent-Length: 5" + b"hello",
        HEAD % b"5\r\nTransfer-Encoding: chunked" + b"hello",
        HEAD % b"\xb2" + b"he",
        (HEAD % b"5").replace(b"Bearer k", b"Bearer j") + b"hello",
        HEAD % b"99999999999" + b"hello",
        b"",
    ],
)
def test_a_head_that_differs_in_a_byte_goes_to_the_parser(data: bytes):
    known = learn(HEAD % b"5" + b"hello")
    assert known is not None
    assert known.body(data) is None


@pytest.mark.parametrize(
    "data", [HEAD % b"5" + b"hell", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"x" * 9000 + b"\r\n\r\n", b""]
)
def test_what_is_not_one_whole_message_with_a_length_is_not_kept(data: bytes):
    assert learn(data) is None


# --- what is found in passing bytes


def test_usage_and_finish_are_found_near_the_end():
    tail = (
        b'{"content":"\\"usage\\":{\\"prompt_tokens\\":99}","finish_reason":null}'
        b'"finish_reason": "length"}],"usage": {"prompt_tokens":5,"completion_tokens":6,'
        b'"completion_tokens_details":{"reasoning_tokens":2}},"x":1}'
    )
    found = usage(tail)
    assert found is not None
    assert (found.prompt, found.output, found.reasoning, found.cached) == (5, 6, 2, 0)
    assert finish(tail) == "length"
    assert usage(b'"usage":null') is None
    assert usage(b'"usage":{"prompt_tokens":"x"}') is None
    assert usage(b"") is None
    assert finish(b"") == ""


ENDINGS = [
    (b'{"choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":6}}', (5, 0, 0, 6), "stop"),
    (
        b'{"usage":{"prompt_tokens":5,"completion_tokens":6,"prompt_tokens_details":{"cached_tokens":4},'
        b'"completion_tokens_details":{"reasoning_tokens":2}},"choices":[{"finish_reason":null},{"finish_reason":"length"}]}',
        (5, 4, 2, 6),
        "length",
    ),
    (b'{"usage":{"prompt_tokens":-5,"completion_tokens":null},"choices":[]}', (0, 0, 0, 0), ""),
    (b'{"usage":null,"choices":[{"finish_reason":"a_new_word"}]}', None, "a_new_word"),
    (b'{"usage":{"prompt_tokens":"x"},"choices":[{"finish_reason":"stop"}]}', None, "stop"),
    (b'{"error":{"message":"\\"usage\\":{\\"prompt_tokens\\":1}"}}', None, ""),
    (b"not JSON", None, ""),
    (b"", None, ""),
]


@pytest.mark.parametrize(("body", "counts", "word"), ENDINGS)
def test_an_answer_means_the_same_decoded_or_searched(body: bytes, counts: tuple[int, int, int, int] | None, word: str):
    wanted = (Counts(*counts) if counts is not None else None, word)
    assert of_answer(body) == wanted
    assert (usage(body), finish(body)) == wanted
    if body.startswith(b"{"):
        assert of_answer(b'{"long":"%b",%b' % (b"x" * TAIL_BYTES, body[1:])) == wanted


HIDDEN = b'data: {"choices": [], "usage": {"prompt_tokens": 1}}'


@pytest.mark.parametrize("mark", [b"\n\n", b"\r\n\r\n"])
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_the_usage_chunk_is_hidden_wherever_reads_split_it(mark: bytes, cuts: list[int]):
    shown = [b'data: {"choices":[{"delta":{"content":"\\"usage\\":{}"}}],"usage":null}', b"data: [DONE]"]
    kept = b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":1}}'  # carries a choice: not ours to hide
    stream = mark.join([shown[0], kept, HIDDEN, shown[1], b""])
    edges = sorted({min(c, len(stream)) for c in cuts} | {0, len(stream)})
    hide = HideUsage()
    out = b"".join(hide.feed(stream[a:b]) for a, b in itertools.pairwise(edges)) + hide.rest()
    assert out == mark.join([shown[0], kept, shown[1], b""])


@pytest.mark.parametrize("data", [b"5\r\nhello\r\n", b"5\r\nhello\r\nA\r\n0123456789\r\n", b"4\r\n\r\n\r\n\r\n"])
def test_whole_chunks_are_known(data: bytes):
    assert whole_chunks(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n3",
        b"5\r\nhello\r\n3\r\n",
        b"5\r\nhell\r\n",
        b"5\r\nhello!\r\n",
        b"5\r\nhello\n\r",
        b"5\nhello\n",
        b"05\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"-5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"5;a=b\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"5\r",
        b"\r\nhello\r\n",
        b"1000\r\n" + bytes(4096) + b"\r\n",
    ],
)
def test_whatever_is_not_plainly_whole_chunks_goes_to_the_parser(data: bytes):
    assert not whole_chunks(data)
