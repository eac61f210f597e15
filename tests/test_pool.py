"""Pools without processes: what may be one, what it is to control, how its models are counted and fitted together."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from neaptide.config import Settings, parse
from neaptide.control.decide import decide
from neaptide.control.desired import deployment, difference, grouped, members
from neaptide.control.signals import Heard, read
from neaptide.control.traits import Told
from neaptide.engine import pipe
from neaptide.engine.core import Ended, Loop
from neaptide.engine.memory import fit
from neaptide.engine.pool import Rounds
from neaptide.engine.protocol import Capacity, Description, Emission, Sampling
from neaptide.engine.report import joined
from neaptide.errors import ConfigError, ModelError
from neaptide.table import Gauges, ModelGauge
from neaptide.types import Carry, Deployment, Load, Replica, Snapshot

ECHOES = "models: {a: {engine: echo}, b: {engine: echo}, c: {engine: echo}, d: {engine: echo}, e: {engine: echo}}\n"


def settings(pools: str, models: str = ECHOES) -> Settings:
    return parse(f"{models}pools: {pools}\n", "neaptide.yaml")


def units(found: Settings) -> dict[str, Deployment]:
    each = [deployment(name, model, "digest") for name, model in found.models.items()]
    return {d.model: d for d in grouped(found, each)}


# --- what may be a pool


@pytest.mark.parametrize(
    ("pools", "code", "said"),
    [
        ("{p: {models: [a, b, c, d, e]}}", "E108", "name 1 to 4; more models need more pools"),
        ("{p: {models: []}}", "E108", "pools.p.models: 0 models"),
        ("{p: {models: [a, x]}}", "E108", "no model 'x'"),
        ("{p: {models: [a, b]}, q: {models: [b]}}", "E108", "b is in pools.p already"),
        ("{p: {models: [a, a]}}", "E108", "a is in pools.p already"),
        ("{a: {models: [b]}}", "E107", "'a' is a model, too"),
        ("{'p p': {models: [b]}}", "E107", "not a name"),
        ("{p: {models: [a], scale: {min: 2, max: 1}}}", "E108", "pools.p.scale"),
        ("{p: {modles: [a]}}", "E104", "did you mean 'models'?"),
        ("{p: {}}", "E105", "models"),
    ],
)
def test_what_is_no_pool_is_refused_with_what_to_write(pools: str, code: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(pools)
    assert caught.value.code == code
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("{engine: openvino, source: ./x}", "b and a have different engines"),
        ("{engine: echo, scale: {min: 2}}", "move models.b.scale to pools.p.scale"),
        ("{engine: echo, options: {cpus: [1]}}", "pinned to different cpus"),
        ("{replicas: [{url: 'http://127.0.0.1:1/v1'}]}", "somebody else runs"),
    ],
)
def test_models_that_cannot_share_a_process_are_told_why(other: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings("{p: {models: [a, b]}}", f"models: {{a: {{engine: echo}}, b: {other}}}\n")
    assert said in str(caught.value)
    assert "one process" in str(caught.value)


# --- what it is to control


def test_a_pool_stands_for_its_models_with_the_strictest_of_their_goals() -> None:
    models = "models: {a: {engine: echo, slo: {ttft_s: 2, tpot_s: 0.05}}, b: {engine: echo, timeouts: {total_s: 60}}, "
    found = units(settings("{p: {models: [a, b], scale: {min: 0, max: 3}}}", models + "c: {engine: echo}}\n"))
    assert list(found) == ["c", "p"]
    pool = found["p"]
    assert (pool.models, pool.scale.max, pool.stable.engine) == (("a", "b"), 3, "echo")
    assert (pool.slo.ttft_s, pool.slo.tpot_s, pool.drain_s) == (1.0, 0.05, 900.0)


def test_what_changes_a_model_changes_its_pools_revision_and_nothing_else_does() -> None:
    pools = "{p: {models: [a, b]}}"
    before = units(settings(pools))["p"].stable.id
    slower = ECHOES.replace("b: {engine: echo}", "b: {engine: echo, max_wait_s: 3}")
    other = ECHOES.replace("b: {engine: echo}", "b: {engine: echo, options: {max_running: 3}}")
    assert units(settings(pools, slower))["p"].stable.id == before
    assert units(settings(pools, other))["p"].stable.id != before
    assert units(settings("{p: {models: [a, b], scale: {min: 2}}}"))["p"].stable.id == before
    assert units(settings("{p: {models: [a]}}"))["p"].stable.id != before


def test_apply_replaces_the_replicas_of_what_changed_shape_and_of_nothing_else() -> None:
    running = {"p": ["p-0"], "c": ["c-0"], "d": ["d-0"]}
    old = settings("{p: {models: [a, b]}}")
    other = ECHOES.replace("b: {engine: echo}", "b: {engine: echo, options: {max_running: 3}}")
    assert difference(old, settings("{p: {models: [a, b]}}", other), running, True).restarts == ("p-0",)
    assert difference(old, settings("{p: {models: [a, b, c]}}"), running, True).restarts == ("c-0", "p-0")
    rescaled = difference(old, settings("{p: {models: [a, b], scale: {min: 2}}}"), running, True)
    assert rescaled.restarts == ()
    assert [(c.key, c.new) for c in rescaled.changes if c.key.endswith("min")] == [("pools.p.scale.min", "2")]
    assert difference(old, parse(ECHOES, "x"), running, True).restarts == ("p-0",)


def test_a_replica_is_told_each_model_with_its_own_weights_options_and_revision() -> None:
    pools, models = (
        "{p: {models: [b, a]}}",
        ECHOES.replace("b: {engine: echo}", "b: {engine: echo, options: {kv_mib: 8}}"),
    )
    found = settings(pools, models)
    told = members(found, units(found)["p"], {"a": "/a", "b": "/b"}, {"a": "a-1", "b": "b-1"})
    assert [(m.model, m.source, m.revision) for m in told] == [("b", "/b", "b-1"), ("a", "/a", "a-1")]
    assert bytes(told[0].options["kv_mib"]) == b"8"
    assert "kv_mib" not in told[1].options


def test_arrivals_of_a_pools_models_add_up_and_means_are_weighed_by_what_they_are_means_of() -> None:
    def word(at_s: float, **models: ModelGauge) -> Gauges:
        return Gauges(gateway="g", mono_s=at_s, fast=1, slow=1, models=models)

    pool_of = {"a": "p", "b": "p"}
    _, heard = read([word(1.0, a=ModelGauge(), b=ModelGauge(), c=ModelGauge())], Heard(), 1.0, None, pool_of)
    a = ModelGauge(arrivals=4, served=3, held_sum_s=3.0, waiting=1, running=2, oldest_wait_s=0.5)
    b = ModelGauge(arrivals=2, served=1, held_sum_s=5.0, waiting=2, running=1, oldest_wait_s=2.0)
    loads, _ = read([word(2.0, a=a, b=b, c=ModelGauge(arrivals=9))], heard, 2.0, {"p": Told(kv_usage=0.7)}, pool_of)
    assert set(loads) == {"p", "c"}
    both = loads["p"]
    assert (both.arrivals, both.waiting, both.running, both.oldest_wait_s, both.kv_usage) == (6, 3, 3, 2.0, 0.7)
    assert both.service_s == pytest.approx(2.0)


def test_a_pool_is_decided_as_one_and_its_sentence_names_its_models() -> None:
    pool = units(settings("{p: {models: [a, b], scale: {min: 0, max: 2, price_per_hour: 3.2}}}"))["p"]
    load = Load(tick_s=1.0, age_s=0.0, arrivals=1, waiting=1)
    snapshot = Snapshot(
        now_s=10.0, now_wall_s=10.0, deployments=(pool,), replicas=(), loads={"p": load}, currency="CNY"
    )
    plan, _ = decide(snapshot, Carry())
    assert [(x.deployment, x.replica) for x in plan.launches] == [("p", "p-0")]
    assert plan.choices[0].sentence.startswith("p (a, b): 0 to 1 replica")
    assert plan.choices[0].cost_per_hour == 3.2
    old = Replica(id="a-0", deployment="a", revision="a-1", state="ready", endpoint="")
    alone = Snapshot(now_s=10.0, deployments=(pool,), replicas=(old,))
    assert decide(alone, Carry())[0].drains == ("a-0",)


# --- how its models are fitted and counted together


def test_models_that_do_not_fit_together_are_told_with_the_sum_and_the_largest() -> None:
    needs = {"a": 300 << 20, "b": 900 << 20}
    fit("p", needs, 1200 << 20)
    with pytest.raises(ModelError) as caught:
        fit("p", needs, 1199 << 20)
    assert caught.value.code == "E213"
    assert "1,200 MiB, and 1,199 MiB are free" in caught.value.what
    assert "take b out of pools.p.models" in caught.value.fix


def stepped(step_s: float, batch: int, running: int) -> pipe.Stepped:
    return pipe.Stepped([], Capacity(running=running, free_slots=1, free_kv_tokens=1), step_s, batch)


def test_a_round_is_the_last_step_of_each_model_that_has_requests() -> None:
    rounds = Rounds(2)
    rounds.step(0, stepped(0.02, 3, 3))
    rounds.step(1, stepped(0.05, 1, 0))  # its only request ends with this step
    rounds.step(0, stepped(0.03, 4, 4))
    told = rounds.meters.steps_told()
    assert told.n == pytest.approx(3, rel=1e-2)
    assert told.step_s == pytest.approx(0.02 + (0.02 + 0.05) + 0.03, rel=1e-2)
    assert told.batch == pytest.approx(3 + (3 + 1) + 4, rel=1e-2)


def test_metrics_of_several_models_have_one_head_a_metric() -> None:
    one = '# TYPE x gauge\nx{m="a"} 1\n# TYPE y counter\ny{m="a"} 2\n'
    other = one.replace('"a"', '"b"')
    assert joined([one, other]) == (
        '# TYPE x gauge\nx{m="a"} 1\nx{m="b"} 1\n# TYPE y counter\ny{m="a"} 2\ny{m="b"} 2\n'
    )
    assert joined([one]) == one


class Counting:
    """An engine with `left` steps to make. Each is said; after the last one of all, `end` is called."""

    def __init__(self, name: str, left: int, said: list[str], most: int, end: Callable[[], None]) -> None:
        self.name, self.left, self.said, self.most, self.end = name, left, said, most, end

    def describe(self) -> Description:
        return Description(engine="x", model=self.name, context_tokens=1, vocab_size=1, max_running=1, kv_tokens=1)

    def free(self) -> Capacity:
        return Capacity(running=0, free_slots=1, free_kv_tokens=1)

    def add(self, id: int, *rest: object) -> None:
        self.left += id

    def busy(self) -> bool:
        return self.left > 0

    def step(self) -> list[Emission]:
        self.left -= 1
        self.said.append(self.name)
        if len(self.said) == self.most:
            self.end()
        return []

    def abort(self, id: int) -> None: ...

    def close(self) -> None: ...


def test_busy_models_make_a_step_each_in_a_ring_and_what_is_told_says_whose_it_is() -> None:
    ours, theirs = socket.socketpair()
    said: list[str] = []
    loop = Loop(theirs)
    for name, left in (("a", 3), ("b", 1), ("c", 2)):
        loop.host(Counting(name, left, said, 8, lambda: ours.sendall(pipe.pack(pipe.Close()))), {})
    ours.sendall(pipe.pack(pipe.Member(1)) + pipe.pack(pipe.Add(2, [], [], 0, Sampling(max_tokens=1))))
    with pytest.raises(Ended):
        loop.run()
    theirs.close()
    assert "".join(said) == "bcabcaba"
    told, whose = {"Ready": "", "Stepped": ""}, 0
    for body in pipe.MessageReader().feed(ours.makefile("rb").read()):
        message = pipe.from_engine.decode(body)
        if isinstance(message, pipe.Member):
            whose = message.index
        else:
            told[type(message).__name__] += "abc"[whose]
    ours.close()
    assert told == {"Ready": "abc", "Stepped": "bcabcaba"}
