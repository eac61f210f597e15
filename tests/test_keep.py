"""keep: what control leaves for its successor, and that only one acts at a time."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import msgspec
import numpy as np

from neaptide.control.keep import (
    OLD_S,
    VERSION,
    Kept,
    Wants,
    hold,
    load,
    read_overrides,
    save,
    write_overrides,
)
from neaptide.control.memory import Memory, pack, state_of, unpack
from neaptide.control.traits import Learnt
from neaptide.control.traits import Memory as Traits
from neaptide.types import Override, Steps

NOW_S = 1_760_000_000.0


def kept(policy: str = "knative", wall_s: float = NOW_S) -> Kept:
    raw = pack(Memory(policy=policy, next_s=NOW_S + 100, wanted=7, busy_s=NOW_S), {"a": np.array([1.0, -math.inf])})
    learnt = Traits(models={"m": Learnt(service_s=3.0, served=50.0, steps=Steps(n=9.0))}, watched={"m-0/1": True})
    return Kept(wall_s=wall_s, policies={"m": raw}, learnt=learnt)


def test_what_is_kept_is_read_back_and_is_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    save(path, kept())
    assert path.stat().st_mode & 0o777 == 0o600
    found = load(path, NOW_S + 5, {"m": Wants("knative", {})})
    assert found.learnt == kept().learnt
    memory = unpack(found.policies["m"], "knative")
    assert memory is not None
    assert state_of(memory)["a"][1] == -math.inf


def test_the_last_count_is_forgotten_because_what_runs_now_is_what_counts(tmp_path: Path) -> None:
    save(tmp_path / "s.json", kept())
    memory = unpack(load(tmp_path / "s.json", NOW_S + 5, {"m": Wants("knative", {})}).policies["m"], "knative")
    assert memory is not None
    assert (memory.wanted, memory.next_s) == (None, -math.inf)


def test_nothing_kept_is_an_empty_start(tmp_path: Path) -> None:
    assert load(tmp_path / "none.json", NOW_S, {}) == Kept()


def test_another_policys_memory_is_set_aside_and_the_rest_goes_on(tmp_path: Path, caplog) -> None:
    save(tmp_path / "s.json", kept("hpa"))
    with caplog.at_level("INFO"):
        found = load(tmp_path / "s.json", NOW_S, {"m": Wants("knative", {})})
    assert found.policies == {}
    assert found.learnt.models["m"].service_s == 3.0
    assert "the policy hpa remembered is set aside, knative decides now" in caplog.text


def test_arrays_of_another_shape_are_set_aside(tmp_path: Path, caplog) -> None:
    save(tmp_path / "s.json", kept())
    for start, stays in (({"a": np.zeros(2)}, True), ({"a": np.zeros(3)}, False), ({"b": np.zeros(2)}, False)):
        with caplog.at_level("WARNING"):
            found = load(tmp_path / "s.json", NOW_S, {"m": Wants("knative", start)})
        assert bool(found.policies) is stays
    assert "it has another shape" in caplog.text


def test_minutes_that_are_long_past_are_of_no_use_but_daily_patterns_are(tmp_path: Path) -> None:
    for policy, stays in (("knative", False), ("slo", True)):
        save(tmp_path / "s.json", kept(policy))
        assert bool(load(tmp_path / "s.json", NOW_S + OLD_S + 1, {"m": Wants(policy, {})}).policies) is stays


def aside(tmp_path: Path, raw: bytes, caplog, said: str) -> None:
    path = tmp_path / "scaling.json"
    path.write_bytes(raw)
    with caplog.at_level("WARNING"):
        assert load(path, NOW_S, {"m": Wants("knative", {})}) == Kept()
    assert said in caplog.text
    assert not path.exists()
    assert (tmp_path / "scaling.json.aside").read_bytes() == raw


def test_another_version_is_set_aside(tmp_path: Path, caplog) -> None:
    tree = {**msgspec.to_builtins(kept()), "version": VERSION + 1, "new": 1}
    aside(tmp_path, msgspec.json.encode(tree), caplog, f"it has version {VERSION + 1}")


def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog) -> None:
    aside(tmp_path, b'{"version": 1, "poli', caplog, "is set aside")


def test_a_file_from_the_future_is_set_aside(tmp_path: Path, caplog) -> None:
    aside(tmp_path, msgspec.json.encode(kept(wall_s=NOW_S + 8 * 3600)), caplog, "the clock was set back")


def test_overrides_are_kept_until_they_end(tmp_path: Path) -> None:
    path = tmp_path / "overrides.json"
    held = {m: Override(count=3, until_wall_s=NOW_S + after, by="ann") for m, after in (("a", 10), ("b", 20))}
    write_overrides(path, held)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_overrides(path, NOW_S) == held
    assert set(read_overrides(path, NOW_S + 15)) == {"b"}
    path.write_text("{")
    assert read_overrides(path, NOW_S) == {}
    assert read_overrides(tmp_path / "none.json", NOW_S) == {}


def test_the_second_control_waits_until_the_first_one_has_ended(tmp_path: Path) -> None:
    import os

    async def story() -> None:
        ending = asyncio.Event()
        first = await hold(tmp_path / "control.lock", ending)
        assert first is not None
        waiting = asyncio.create_task(hold(tmp_path / "control.lock", ending))
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        assert not done
        os.close(first)
        second = await asyncio.wait_for(waiting, 5)
        assert second is not None
        third = asyncio.create_task(hold(tmp_path / "control.lock", ending))
        ending.set()
        assert await asyncio.wait_for(third, 5) is None
        os.close(second)

    asyncio.run(story())
