"""Hot prefixes: what is counted, what a new replica computes ahead, and that neither costs a request or a secret."""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neaptide import link
from neaptide.control.prime import Priming, sibling
from neaptide.engine.hot import HALF_LIFE_S, Hot
from neaptide.engine.prime import pieces
from neaptide.models.sources import GUIDE
from neaptide.types import Launch, Replica
from tests.conftest import Service
from tests.link_client import Heard
from tests.replica_process import ReplicaProcess, UnixHTTPConnection, wait_for
from tests.replica_stage import Stage
from tests.traffic import chat

SYSTEM = "You are the assistant of a shop that sells tide tables, charts and compasses to sailors. " * 6


def ids(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(200), k=count)


# ------------------------------------------------------------------------------------------------ what is counted


def test_what_several_prompts_begin_with_is_hot_and_what_one_alone_says_is_not() -> None:
    hot, common = Hot(16), ids(0, 64)
    for seed in range(3):
        hot.saw([*common, *ids(seed + 1, 100)], now_s=seed)
    assert hot.hottest(10_000) == [common]
    hot.saw(ids(9, 100), now_s=4)
    assert hot.hottest(10_000) == [common]


def test_prefixes_that_share_a_beginning_are_told_to_their_ends_the_most_asked_for_first() -> None:
    hot, common = Hot(16), ids(0, 32)
    often, rarely = [*common, *ids(1, 16)], [*common, *ids(2, 32)]
    for prefix, times in ((rarely, 2), (often, 5)):
        for _ in range(times):
            hot.saw(prefix, now_s=0)
    assert hot.hottest(10_000) == [often, rarely]
    assert hot.hottest(48) == [often]
    assert hot.hottest(32) == [common]
    assert hot.hottest(15) == []


def test_what_was_hot_long_ago_gives_way_to_what_is_hot_now() -> None:
    hot, old, new = Hot(16), ids(1, 16), ids(2, 16)
    for _ in range(100):
        hot.saw(old, now_s=0)
    for _ in range(2):
        hot.saw(new, now_s=10 * HALF_LIFE_S)
    assert hot.hottest(16) == [new]
    for _ in range(2):
        hot.saw(old, now_s=2000 * HALF_LIFE_S)  # past what a float could count
    assert hot.hottest(16) == [old]


def test_memory_is_bounded_and_a_flood_of_single_prompts_does_not_wash_the_hot_ones_out() -> None:
    hot, common = Hot(16, most_blocks=100), ids(0, 64)
    for i in range(200):
        hot.saw([*common, *ids(i, 64)], now_s=i / 10)
        hot.saw(ids(1000 + i, 160), now_s=i / 10)
        assert len(hot) <= 100 + 10
    assert hot.hottest(10_000) == [common]


# ------------------------------------------------------------------------------------------------ in which order


def test_a_prefix_is_computed_in_steps_and_what_it_shares_with_an_earlier_one_is_not_computed_again() -> None:
    one, two = ids(1, 100), [*ids(1, 64), *ids(2, 40)]
    assert [(p.start, p.end) for p in pieces([one, two], 32, 1000)] == [
        (0, 32), (32, 64), (64, 96), (96, 100), (64, 96), (96, 104),
    ]  # fmt: skip


def test_no_more_is_computed_than_there_is_room_for() -> None:
    assert [p.end for p in pieces([ids(1, 64), ids(2, 64), ids(3, 64)], 64, 100)] == [64, 36]


def in_loop(test: Callable[[], None]) -> Callable[[], None]:
    """A stage's timers want a running loop; nothing here waits for them."""

    async def play() -> None:
        test()

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(play())

    return run


class Primed(Stage):
    """A stage that may be primed, and is asked in text."""

    def __init__(self, prefixes: list[list[int]] | None = None) -> None:
        super().__init__(4)
        self.connect()
        if prefixes:
            self.service.prime(prefixes)

    def say(self, prompt: str) -> Heard:
        """Send it; what is heard of it."""
        connection, wire = self.gateways[0]
        number = len(wire.heard) + 1
        body = json.dumps({"prompt": prompt, "max_tokens": 20}).encode()
        heard = wire.heard[number] = Heard()
        wire.credit[number] = link.CREDIT_BYTES
        header = link.OpenHeader(request_id=f"r{number}", route="completions", body_bytes=len(body))
        connection.data_received(link.frame(number, link.OPEN, link.pack_header(header, body)))
        return heard

    def cached(self, prompt: str) -> int:
        """Cached tokens of a request that is answered alone."""
        heard = self.say(prompt)
        self.step(100)
        assert heard.end is not None
        return heard.end.cached_tokens


@in_loop
def test_a_new_replica_computes_ahead_while_idle_and_its_first_request_finds_it() -> None:
    old = Primed()
    assert old.cached(SYSTEM[:200] + "A tide?") == 0
    assert old.cached(SYSTEM[:200] + "A chart?") > 150
    (hot,) = prefixes = old.service.hottest()
    new, cold = Primed(prefixes), Primed()
    new.step(100)
    assert new.service.primer.tokens == len(hot) > 150
    assert new.cached(SYSTEM[:200] + "A compass?") == len(hot)
    assert cold.cached(SYSTEM[:200] + "A compass?") == 0


@in_loop
def test_what_is_computed_ahead_waits_for_requests_and_is_no_request_itself() -> None:
    new = Primed()
    heard = new.say("A compass?")
    new.service.prime([ids(1, 64)])
    new.step(3)
    assert new.service.primer.tokens == 0  # a request runs
    assert new.service.load().running == 1
    new.step(100)
    assert heard.end is not None
    assert new.service.primer.tokens == 64  # after it
    steps = new.service.meters.steps
    new.service.prime([ids(2, 64)])
    assert new.service.load().running == 0
    new.step(100)
    assert new.service.primer.tokens == 128
    assert new.service.meters.steps == steps


@in_loop
def test_prefixes_of_another_vocabulary_are_left_alone() -> None:
    new = Primed([[5, 99_999] * 16, [-1] * 32, []])
    new.step(100)
    assert new.service.primer.tokens == 0


# ------------------------------------------------------------------------------------------------ real replicas


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Any]:
    made: list[ReplicaProcess] = []

    def start(name: str, **fields: Any) -> ReplicaProcess:
        (tmp_path / name).mkdir()
        fields = {"id": name, "engine": "openvino", "source": str(GUIDE), "model": "guide", **fields}
        if fields["engine"] == "openvino":
            fields["options"] = {"kv_mib": 8, "threads": 1, "chunk_tokens": 64}
        else:
            fields["source"] = ""
        made.append(ReplicaProcess(tmp_path / name, **fields))
        return made[-1]

    yield start
    for replica in made:
        replica.stop()


def call(path: str, method: str, target: str, body: Any = None, token: str = "boot") -> tuple[int, Any]:
    connection = UnixHTTPConnection(path)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, target, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def told(replica: ReplicaProcess) -> dict[str, Any]:
    return json.loads(replica.get("/about")[1])


def cached(replica: ReplicaProcess, question: str) -> int:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    body = {"model": "guide", "messages": messages, "max_tokens": 2}
    status, answer = call(replica.spec.http_path, "POST", "/v1/chat/completions", body)
    assert status == 200, answer
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def ready(replica: ReplicaProcess) -> ReplicaProcess:
    replica.client(timeout_s=60.0).close()
    return replica


def test_a_new_guide_replica_finds_the_hot_prefix_in_its_first_request(replicas: Any) -> None:
    old = ready(replicas("guide-0"))
    assert cached(old, "What is a tide?") == 0
    cached(old, "And a compass?")
    status, prefixes = call(old.spec.http_path, "GET", "/prefixes")
    assert status == 200
    (hot,) = prefixes["guide"]
    assert len(hot) % 32 == 0

    new = replicas("guide-1")
    wait_for(lambda: Path(new.spec.http_path).exists())
    assert call(new.spec.http_path, "POST", "/prefixes", prefixes)[0] == 200
    ready(new)
    wait_for(lambda: told(new)["primed_tokens"] == len(hot))
    assert cached(new, "Where is my chart?") >= len(hot)
    assert "sailors" not in new.log() + old.log()
    assert str(hot[:4])[1:-1] not in new.log() + old.log()


@pytest.mark.parametrize(("engine", "sharing"), [("openvino", "tenant"), ("echo", "off")])
def test_where_tenants_share_no_cache_nothing_is_counted_told_or_taken(
    replicas: Any, engine: str, sharing: str
) -> None:
    replica = ready(replicas("guide-0", engine=engine, prefix_cache=sharing))
    for question in ("What is a tide?", "And a compass?"):
        assert cached(replica, question) == 0
    assert call(replica.spec.http_path, "GET", "/prefixes") == (200, {"guide": []})
    assert call(replica.spec.http_path, "POST", "/prefixes", {"guide": [ids(1, 64)]})[0] == 200
    assert cached(replica, "What is a tide?") == 0
    assert told(replica)["primed_tokens"] == 0


def test_prefixes_are_told_only_to_whom_has_the_boot_token(replicas: Any) -> None:
    replica = ready(replicas("echo-0", engine="echo"))
    for token in ("", "wrong"):
        for method in ("GET", "POST"):
            assert call(replica.spec.http_path, method, "/prefixes", {}, token)[0] == 401
    assert call(replica.spec.http_path, "POST", "/prefixes", {"guide": "x"})[0] == 400


# ------------------------------------------------------------------------------------------------ control


def replica(id: str, revision: str = "r", state: Any = "ready", started_s: float = 0.0) -> Replica:
    return Replica(id=id, deployment="m", revision=revision, state=state, endpoint="", started_s=started_s)


def test_the_oldest_ready_replica_of_the_same_revision_is_asked() -> None:
    fleet = [
        replica("a", started_s=1, state="draining"),
        replica("b", started_s=2, revision="other"),
        replica("c", started_s=4),
        replica("d", started_s=3),
    ]
    found = sibling("r", fleet)
    assert found is not None
    assert found.id == "d"
    without = sibling("r", fleet[:2])
    assert without is not None
    assert without.id == "a"  # it remembers while it drains
    assert sibling("new", fleet) is None


def test_control_passes_prefixes_from_the_old_replica_to_one_that_is_only_starting(replicas: Any) -> None:
    old, new = ready(replicas("echo-0", engine="echo")), replicas("echo-1", engine="echo")
    for question in ("What is a tide?", "And a compass?"):
        cached(old, question)
    paths = {r.spec.id: Path(r.spec.http_path) for r in (old, new)}

    async def pass_on() -> None:
        priming = Priming(paths.__getitem__, "boot")
        priming.launched([Launch(deployment="m", replica="echo-1", epoch=1)], {"m": "r"}, [replica("echo-0")])
        while told(new)["primed_tokens"] == 0:
            await asyncio.sleep(0.01)

    wait_for(lambda: Path(new.spec.http_path).exists())
    asyncio.run(pass_on())
    assert cached(ready(new), "Where is my chart?") > 0


def test_a_replica_that_scaling_adds_is_primed_by_control(serve: Any) -> None:
    text = "models: {echo: {engine: echo, scale: {min: 1, max: 2, policy: fixed}}}"
    service: Service = serve(text)
    for question in ("What is a tide?", "And a compass?"):
        assert chat(service, SYSTEM + question, max_tokens=2).join(60).status == 200
    service.run("scale", "set", "echo", "2", "--for", "1h")
    added = str(service.state / "run" / "echo-1.http")
    wait_for(lambda: Path(added).exists(), 60.0)
    wait_for(lambda: call(added, "GET", "/about")[1]["primed_tokens"] > 0, 60.0)
