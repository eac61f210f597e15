"""A pool end to end: four models behind one door, one replica process for all, counted, priced and told as one."""

from __future__ import annotations

import http.client
import json
import os
import signal
import urllib.parse
from collections.abc import Callable
from typing import Any

from tests.conftest import Service
from tests.dashboard_kit import events
from tests.traffic import admin, chat, rows_when, stream, wait_for

SLOW = "{engine: echo, options: {max_running: 2, echo_tpot_ms: 20}}"
TAIL = f"""
pools:
  tail: {{models: [one, two], scale: {{min: 1, max: 2, price_per_hour: 3.2}}}}
models:
  alone: {{engine: echo}}
  one: {SLOW}
  two: {SLOW.replace("{engine", "{aliases: [zwei], engine")}
"""
ZERO = TAIL.replace("min: 1", "min: 0")
GUIDES = """
pools:
  guides: {models: [guide, twin]}
models:
  guide: {}
  twin: {source: guide, options: {context_tokens: 512, kv_mib: 8}}
"""
Serve = Callable[..., Service]


def status(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = admin(service, "api/v1/status")
    return found


def replicas(service: Service) -> dict[str, int]:
    return {r["id"]: r["pid"] for r in status(service)["replicas"] if r["state"] == "ready"}


def by_model(service: Service) -> dict[str, dict[str, Any]]:
    return {d["model"]: d for d in status(service)["deployments"]}


def told(service: Service, *args: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(service.run("scale", *args, "--json").stdout)["rows"]
    return rows


def page(service: Service) -> dict[str, Any]:
    """What the live page is told first."""
    here = http.client.HTTPConnection(urllib.parse.urlsplit(service.admin).netloc, timeout=20)

    def ask(method: str, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        here.request(method, path, headers=headers)
        return here.getresponse()

    token = (service.state / "admin-token").read_text().strip()
    ticket = json.loads(ask("POST", "/ui/ticket", {"Authorization": f"Bearer {token}"}).read())["url"]
    signed_in = ask("GET", ticket.removeprefix(service.admin.rstrip("/")), {})
    signed_in.read()
    cookie = signed_in.headers["set-cookie"].partition(";")[0]
    _, told = next(events(ask("GET", "/ui/live", {"Cookie": cookie, "Sec-Fetch-Site": "same-origin"})))
    here.close()
    return dict(told)


def test_models_of_a_pool_answer_from_one_process_and_are_told_apart_everywhere(serve: Serve) -> None:
    service = serve(TAIL)
    assert set(replicas(service)) == {"alone-0", "tail-0"}
    held = [stream(service, f"stream {model}", model, max_tokens=400) for model in ("one", "zwei")]
    for answer in held:
        assert answer.first.wait(30)
    wait_for(lambda: [by_model(service)[m]["running"] for m in ("alone", "one", "two")] == [0, 1, 1], "one each")
    running = {r["id"]: r["running"] for r in status(service)["replicas"]}
    assert running == {"alone-0": 0, "tail-0": 2}
    assert {m: d.get("pool", "") for m, d in by_model(service).items()} == {"alone": "", "one": "tail", "two": "tail"}
    for answer in held:
        answer.leave()
    assert chat(service, "plain", "two", max_tokens=3).join().text == "use"
    rows = rows_when(service, 3)
    revisions = {r["model"]: r["revision"] for r in rows}
    assert set(revisions) == {"one", "two"}
    assert all(revision.startswith(f"{model}-") for model, revision in revisions.items())
    (row,) = told(service, "show", "two")
    assert (row["model"], row["members"], row["cost_per_hour"]) == ("tail", ["one", "two"], 3.2)
    drawn = service.run("status").stdout
    assert "two (zwei) @ tail" in drawn
    shown = {m["model"]: m for m in page(service)["state"]["models"]}
    assert {name: m["members"] for name, m in shown.items()} == {
        "alone": [],
        "one": [],
        "two": [],
        "tail": ["one", "two"],
    }
    assert (shown["tail"]["max"], shown["tail"]["price_per_hour"], shown["one"]["price_per_hour"]) == (2, 3.2, 0.0)


def test_a_pool_at_zero_starts_once_for_whichever_model_is_asked_for_and_its_reason_names_both(serve: Serve) -> None:
    service = serve(ZERO)
    assert set(replicas(service)) == {"alone-0"}
    first = [chat(service, "wake", model, max_tokens=2) for model in ("one", "two")]
    assert [answer.join(60).status for answer in first] == [200, 200]
    assert set(replicas(service)) == {"alone-0", "tail-0"}
    assert any("tail (one, two): 0 to 1 replica" in r["choice"]["sentence"] for r in told(service, "why", "one"))


def test_a_dead_pool_replica_comes_back_for_all_its_models_and_their_streams_go_on(serve: Serve) -> None:
    service = serve(TAIL)
    held = [stream(service, "x" * 40, model, max_tokens=300) for model in ("one", "two")]
    for answer in held:
        assert answer.first.wait(30)
    os.kill(replicas(service)["tail-0"], signal.SIGKILL)
    for answer in held:
        assert answer.join(60).done, (answer.error, answer.broken)
        assert answer.finish == "length"
    for model in ("one", "two"):
        assert chat(service, "again", model, max_tokens=2).join(60).status == 200


def test_a_restarted_control_adopts_the_pool_and_apply_replaces_it_as_one(serve: Serve) -> None:
    service = serve(TAIL)
    before = replicas(service)
    control = service.pids["control"][0]
    os.kill(control, signal.SIGKILL)

    def back() -> bool:
        try:
            return bool(status(service)["ready"])
        except OSError:
            return False

    wait_for(back, "control is back", 60.0)
    assert replicas(service) == before
    assert chat(service, "still here", "two", max_tokens=2).join().status == 200
    service.config.write_text(TAIL.replace("max_running: 2", "max_running: 3", 1), encoding="utf-8")
    report = json.loads(service.run("apply", "-f", str(service.config), "--json").stdout)
    assert report["restarts"] == ["tail-0"]
    wait_for(lambda: set(replicas(service)) == {"alone-0", "tail-1"}, "the new pool", 60.0)
    assert chat(service, "new", "one", max_tokens=2).join().status == 200


def test_a_pool_that_cannot_start_fails_for_all_its_models_with_the_one_that_is_at_fault(serve: Serve) -> None:
    service = serve(ZERO.replace("max_running: 2", "max_running: 2, precision: f32", 1))
    refused = chat(service, "hello", "two").join(60)
    assert (refused.status, refused.error) == (503, "replica_failing")
    failing = {m: d["failing"] for m, d in by_model(service).items()}
    assert failing["alone"] == ""
    assert "models.one.options.precision" in failing["one"]
    assert failing["one"] == failing["two"]


def test_two_real_models_answer_from_one_engine_process(serve: Serve) -> None:
    service = serve(GUIDES)
    assert set(replicas(service)) == {"guides-0"}
    found = by_model(service)
    assert found["twin"]["context_tokens"] == 512
    assert found["guide"]["context_tokens"] > 512
    question = "What is Neaptide?"
    answers = [stream(service, question, model, max_tokens=12, temperature=0) for model in ("guide", "twin", "guide")]
    texts = [answer.join(120).text for answer in answers]
    assert texts[0]
    assert texts[0] == texts[1] == texts[2]
    assert [p["role"] for p in status(service)["processes"]].count("engine") == 1
    (replica,) = status(service)["replicas"]
    assert {"memory_s", "load_s", "ready_s"} <= {s["name"] for s in replica["stages"]}
