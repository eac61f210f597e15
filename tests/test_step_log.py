"""The step log: what each step of an engine computed and how long it took, told from what went in and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from neaptide.clock import RealClock, VirtualClock
from neaptide.engine.echo import EchoEngine
from neaptide.engine.log import Log
from neaptide.engine.protocol import Capacity, Description, Emission, Sampling
from neaptide.engine.steplog import Logged, watched
from neaptide.errors import ConfigError
from neaptide.specs import MemberSpec, ReplicaSpec

CHUNK = 100
STEP_S, AROUND_S = 0.010, 0.002


class Chunking:
    """Decodes everybody and prefills CHUNK tokens less those, first come first served; `cached` of each prompt."""

    def __init__(self, clock: VirtualClock, cached: int = 0) -> None:
        self._clock, self._cached = clock, cached
        self._left: dict[int, int] = {}
        self._want: dict[int, int] = {}
        self._gone: list[int] = []

    def describe(self) -> Description:
        return Description(
            engine="chunking", model="m", context_tokens=4096, vocab_size=10, max_running=8, kv_tokens=9000,
            chunk_tokens=CHUNK,
        )  # fmt: skip

    def free(self) -> Capacity:
        return Capacity(running=len(self._want), free_slots=8 - len(self._want), free_kv_tokens=9000)

    def add(
        self, id: int, prompt_ids: Sequence[int], generated_ids: Sequence[int], emitted_chars: int, sampling: Sampling
    ) -> None:
        if not prompt_ids:
            raise ValueError("no prompt")
        self._left[id] = len(prompt_ids) - self._cached
        self._want[id] = sampling.max_tokens

    def step(self) -> list[Emission]:
        self._clock.advance(STEP_S)
        room = CHUNK - sum(not left for left in self._left.values())
        found = [Emission(id=id, finish="abort") for id in self._gone]
        self._gone.clear()
        for id in list(self._left):
            took = min(self._left[id], room)
            first = self._left[id] > 0
            self._left[id] -= took
            room -= took
            if not self._left[id]:
                found.append(self._token(id, self._cached if first else 0))
        return found

    def _token(self, id: int, cached: int) -> Emission:
        self._want[id] -= 1
        if self._want[id]:
            return Emission(id=id, token_ids=[1], cached_tokens=cached)
        del self._want[id], self._left[id]
        return Emission(id=id, token_ids=[1], cached_tokens=cached, finish="length")

    def busy(self) -> bool:
        return bool(self._want or self._gone)

    def abort(self, id: int) -> None:
        del self._want[id], self._left[id]
        self._gone.append(id)

    def close(self) -> None:
        pass


class Play:
    """A Chunking engine behind its log, driven as the engine process drives one."""

    def __init__(self, path: Path, cached: int = 0) -> None:
        self.clock = VirtualClock()
        inner = Chunking(self.clock, cached)
        self.path = path
        self.engine = Logged(inner, Log(str(path), head={"event": "engine", "chunk_tokens": CHUNK}), self.clock)

    def add(self, id: int, prompt: int, out: int) -> None:
        self.engine.add(id, [1] * prompt, [], 0, Sampling(max_tokens=out))

    def turn(self) -> None:
        assert self.engine.busy()
        self.engine.step()
        self.clock.advance(AROUND_S)

    def rest(self) -> None:
        while self.engine.busy():
            self.turn()

    def steps(self) -> list[dict[str, Any]]:
        lines = [msgspec.json.decode(line) for line in self.path.read_bytes().splitlines()]
        assert lines[0] == {"event": "engine", "chunk_tokens": CHUNK}
        return [line for line in lines if line["event"] == "step"]


def made_of(steps: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [tuple(step[name] for name in ("batch", "context", "prefill", "pairs")) for step in steps]


def test_a_prompt_is_prefilled_once_and_then_a_token_is_decoded_a_step(tmp_path: Path) -> None:
    play = Play(tmp_path / "steps")
    play.add(1, 10, 3)
    play.rest()
    # Ten tokens attend 1 + 2 + ... + 10 pairs; the first decoding reads the prompt and the first token.
    assert made_of(play.steps()) == [(0, 0, 10, 55.0), (1, 11, 0, 0.0), (1, 12, 0, 0.0)]


def test_a_long_prompt_takes_several_chunks_and_leaves_room_for_who_decodes(tmp_path: Path) -> None:
    play = Play(tmp_path / "steps")
    play.add(1, 20, 5)
    play.turn()
    play.add(2, 150, 1)
    play.rest()
    first, second, third, *_ = made_of(play.steps())
    assert first == (0, 0, 20, 210.0)
    assert second == (1, 21, 99, 99 * 50)
    assert third == (1, 22, 51, 51 * (99 + 26))


def test_prompts_that_fit_one_step_are_prefilled_together(tmp_path: Path) -> None:
    play = Play(tmp_path / "steps")
    play.add(1, 30, 1)
    play.add(2, 50, 1)
    play.rest()
    assert made_of(play.steps()) == [(0, 0, 80, 30 * 15.5 + 50 * 25.5)]


def test_what_was_cached_was_not_computed(tmp_path: Path) -> None:
    play = Play(tmp_path / "steps", cached=64)
    play.add(1, 80, 1)
    play.rest()
    assert made_of(play.steps()) == [(0, 0, 16, 16 * (64 + 8.5))]


def test_the_turns_of_a_busy_engine_leave_no_gap_and_do_not_count_idle_time(tmp_path: Path) -> None:
    play = Play(tmp_path / "steps")
    play.add(1, 10, 2)
    play.rest()
    play.clock.advance(60.0)
    play.add(2, 10, 2)
    play.rest()
    for step in play.steps():
        assert step["step_s"] == pytest.approx(STEP_S)
        assert step["turn_s"] == pytest.approx(STEP_S + AROUND_S)


def test_requests_that_leave_are_forgotten_and_a_step_that_computed_nothing_is_not_told(tmp_path: Path) -> None:
    play = Play(tmp_path / "steps")
    play.add(1, 10, 50)
    play.add(2, 10, 3)
    play.turn()
    play.engine.abort(1)
    play.rest()
    play.add(3, 10, 9)
    play.engine.abort(3)
    play.rest()
    assert made_of(play.steps()) == [(0, 0, 20, 110.0), (1, 11, 0, 0.0), (1, 12, 0, 0.0)]


def test_a_request_that_the_engine_refuses_is_none_of_its_steps(tmp_path: Path) -> None:
    play = Play(tmp_path / "steps")
    with pytest.raises(ValueError, match="no prompt"):
        play.add(1, 0, 1)
    play.add(2, 5, 1)
    play.rest()
    assert made_of(play.steps()) == [(0, 0, 5, 15.0)]


def test_each_file_of_a_rotated_log_says_what_the_engine_is(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    log = Log(str(path), head={"event": "engine", "model": "m"})
    line = "x" * 1000
    while not Path(f"{path}.1").exists():
        log.info("step", filler=line)
    for part in (path, Path(f"{path}.1")):
        with part.open("rb") as file:
            assert msgspec.json.decode(file.readline()) == {"event": "engine", "model": "m"}


def spec(tmp_path: Path, **options: object) -> ReplicaSpec:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in options.items()}
    return ReplicaSpec(
        id="e-0", epoch=1, model="e", revision="r", engine="echo", options=raw, log_path=str(tmp_path / "e-0.log")
    )


def test_an_engine_is_watched_where_its_options_ask_for_it(tmp_path: Path) -> None:
    clock = VirtualClock()
    plain = spec(tmp_path)
    engine = EchoEngine(plain, clock, clock.advance)
    assert watched(engine, plain) is engine
    asking = spec(tmp_path, step_log=True)
    logged = watched(EchoEngine(asking, clock, clock.advance), asking)
    logged.add(1, list(b"tide"), [], 0, Sampling(max_tokens=3))
    while logged.busy():
        logged.step()
    head, *steps = [msgspec.json.decode(x) for x in (tmp_path / "e-0.steps.jsonl").read_bytes().splitlines()]
    assert (head["event"], head["engine"], head["max_running"]) == ("engine", "echo", 256)
    assert [step["prefill"] for step in steps] == [4, 0, 0]
    with pytest.raises(ConfigError):
        watched(engine, spec(tmp_path, step_log="perhaps"))


def test_models_that_share_a_replica_have_a_file_each(tmp_path: Path) -> None:
    clock = VirtualClock()
    options = {"step_log": msgspec.Raw(b"true")}
    names = ("small/one", "small/two")
    members = tuple(MemberSpec(model=name, revision="r", options=options) for name in names)
    pool = msgspec.structs.replace(spec(tmp_path), members=members)
    for one in pool.each():
        watched(EchoEngine(one, clock, clock.advance), one)
    for place, name in enumerate(names):
        head = msgspec.json.decode((tmp_path / f"e-0.{place}.steps.jsonl").read_bytes())
        assert head["model"] == name


# ------------------------------------------------------------------------------------------------ a real engine


def test_a_real_engines_steps_are_told_as_its_scheduler_makes_them(tmp_path: Path) -> None:
    """What the simulator takes for granted of OpenVINO's scheduler: decoding goes first, prompts fill the chunk in the
    order in which they came."""
    library = pytest.importorskip("neaptide.engine.openvino", exc_type=ImportError)
    options = {"threads": 1, "max_running": 4, "kv_mib": 8, "chunk_tokens": 96}
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in options.items()}
    source = str(Path(__file__).parent.parent / "neaptide" / "models" / "guide")
    real = ReplicaSpec(
        id="e-0", epoch=0, model="e", revision="r", engine="openvino", source=source, options=raw, prefix_cache="off"
    )
    inner = library.OpenVinoEngine(real, {})
    path = tmp_path / "steps"
    engine = Logged(inner, Log(str(path)), RealClock())
    assert engine.describe().chunk_tokens == 96
    tokens = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)
    engine.add(1, [300 + i for i in range(100)], [], 0, tokens)
    engine.add(2, [700 + i for i in range(200)], [], 0, tokens)
    while engine.busy():
        engine.step()
    engine.close()
    lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    told = [(line["batch"], line["context"], line["prefill"]) for line in lines]
    prompts = [(0, 0, 96), (0, 0, 96), (1, 101, 95), (1, 102, 13)]  # 4 and 92 of the second step are of either prompt
    assert told[:4] == prompts
    assert told[4:7] == [(2, 103 + 201, 0), (2, 104 + 202, 0), (2, 105 + 203, 0)]
    assert all(line["turn_s"] >= line["step_s"] > 0 for line in lines)
