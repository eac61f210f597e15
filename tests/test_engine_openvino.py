"""What only the OpenVINO engine can get wrong: the library's traps, each with the guard that keeps us out of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from neaptide.engine import calibrate
from neaptide.engine.protocol import Sampling
from neaptide.engine.text import Text
from neaptide.engine.tokens import load_tokenizer
from neaptide.specs import ReplicaSpec
from tests.replica_process import ReplicaProcess
from tests.test_engine_contract import GUIDE, add, ask, collect, finish_all, prompt

openvino = pytest.importorskip("neaptide.engine.openvino", exc_type=ImportError)
pipeline = openvino.pipeline


def build(
    prefix_cache: str = "shared", cache_dir: str = "", slo_tpot_s: float = 0.1, **options: object
) -> tuple[object, dict[str, float]]:
    settings = {"threads": 1, "max_running": 4, "kv_mib": 8, **options}
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in settings.items()}
    stages: dict[str, float] = {}
    spec = ReplicaSpec(
        id="e-0", epoch=0, model="e", revision="r", engine="openvino", source=str(GUIDE), options=raw,
        prefix_cache=prefix_cache, cache_dir=cache_dir, slo_tpot_s=slo_tpot_s,
    )  # fmt: skip
    return openvino.OpenVinoEngine(spec, stages), stages


def test_an_abort_inside_a_prefill_does_not_spoil_the_prefix_for_the_next() -> None:
    """The library marks a block complete when its prefill begins; cancelled then, it would be reused half empty."""
    clean, _ = build("off", chunk_tokens=50)
    expected = ask(clean, prompt(110), max_tokens=3, logprobs=0).logprobs
    clean.close()
    engine, _ = build("shared", chunk_tokens=50)
    before = engine.free()
    id = add(engine, prompt(110), max_tokens=3)
    answers = {}
    collect(engine, answers)  # 50 of 110 tokens
    engine.abort(id)
    collect(engine, answers)
    assert answers[id].finish == "abort", "its client is let go at once"
    finish_all(engine)
    assert engine.free() == before
    assert ask(engine, prompt(110), max_tokens=3, logprobs=0).logprobs == pytest.approx(expected, abs=0.06)
    engine.close()


def test_a_tenant_cache_is_served_without_a_cache() -> None:
    engine, _ = build("tenant", chunk_tokens=64)
    assert not engine.describe().prefix_cache
    engine.close()


def test_the_kv_memory_asked_for_is_what_the_library_takes() -> None:
    engine, _ = build(kv_mib=8, chunk_tokens=64)
    ask(engine, prompt(40), max_tokens=2)
    assert engine._pipeline.get_metrics().cache_size_in_bytes == pytest.approx(8 << 20, rel=0.02)
    engine.close()


@pytest.mark.parametrize("slo_tpot_s", [0.1, 0.004])
def test_prefill_is_measured_once_and_the_chunk_follows_it(tmp_path: Path, slo_tpot_s: float) -> None:
    engine, stages = build(cache_dir=str(tmp_path), slo_tpot_s=slo_tpot_s)
    assert "calibrate_s" in stages
    kept = msgspec.json.decode((tmp_path / calibrate.FILE).read_bytes(), type=dict[str, calibrate.Calibration])
    (rate,) = (entry.prefill_tokens_per_s for entry in kept.values())
    wanted = calibrate.chunk_tokens(rate, slo_tpot_s)
    assert calibrate.is_close(engine._plan.chunk_tokens, wanted)
    engine.close()
    engine, stages = build(cache_dir=str(tmp_path), slo_tpot_s=slo_tpot_s)
    assert "calibrate_s" not in stages
    assert engine._plan.chunk_tokens == wanted
    engine.close()


def test_a_penalty_out_of_its_range_is_refused_before_the_library_sees_it() -> None:
    engine, _ = build(chunk_tokens=64)
    for sampling in ({"presence_penalty": 9.0}, {"repetition_penalty": 0.0}, {"temperature": 1.0, "top_p": 0.0}):
        with pytest.raises(ValueError, match="sampling refused"):
            add(engine, prompt(9), **sampling)
    with pytest.raises(ValueError, match="token ids"):
        add(engine, [1 << 20])
    assert not engine.busy()
    engine.close()


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("stops", [(), (7,)])
@pytest.mark.parametrize("min_tokens", [0, 3])
def test_every_mixture_of_stop_settings_is_valid(ignore_eos: bool, stops: tuple[int, ...], min_tokens: int) -> None:
    sampling = Sampling(max_tokens=5, min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=stops)
    config = pipeline.generation_config(sampling, 5, 0, frozenset({2}))
    config.validate()
    assert set(config.stop_token_ids) == set(stops) | (set() if ignore_eos else {2})


def test_a_resumed_answer_says_what_its_replica_says_after_the_same_ids(tmp_path: Path) -> None:
    options = {"threads": 1, "max_running": 2, "kv_mib": 8, "chunk_tokens": 64}
    replica = ReplicaProcess(
        tmp_path, engine="openvino", source=str(GUIDE), model="guide", prefix_cache="off", options=options
    )
    try:
        client = replica.client(timeout_s=60.0)
        said = {"messages": [{"role": "user", "content": "Neaptide 是什么？"}]}
        asked = client.call({"messages": said["messages"]}, "tokenize").body["tokens"]
        greedy: dict[str, Any] = {"temperature": 0, "stream": True}
        tokenizer = load_tokenizer(GUIDE)
        whole = client.call({"prompt": asked, "max_tokens": 12, **greedy}, "completions")
        assert len(whole.ids) >= 8
        for k in (1, 5, 7):
            have = whole.ids[:k]
            resumed = client.call({**said, "max_tokens": 12, **greedy}, generated_ids=have, emitted_chars=None)
            fresh = client.call({"prompt": [*asked, *have], "max_tokens": 12 - k, **greedy}, "completions")
            assert resumed.ids
            assert resumed.ids == fresh.ids
            told = Text(tokenizer.decoder()).push(have)
            assert told + resumed.text == Text(tokenizer.decoder(), (), [*have, *resumed.ids]).finish()
            assert resumed.end is not None
            assert (resumed.end.prompt_tokens, resumed.end.output_tokens) == (len(asked), len(resumed.ids))
    finally:
        replica.stop()


def test_importing_the_library_loads_nothing_that_could_report_it() -> None:
    probe = (
        "import sys, neaptide.engine.openvino\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "assert not [m for m in sys.modules if 'telemetry' in m and sys.modules[m] is not None]\n"
    )
    assert subprocess.run([sys.executable, "-c", probe], timeout=60).returncode == 0
