"""The engine's pure parts: KV accounting, the prefix model, calibration, the size of a block."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.engine import calibrate
from neaptide.engine.blocks import PrefixModel, Reservations
from neaptide.engine.calibrate import Calibration
from neaptide.models import directory
from neaptide.models.sources import GUIDE


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300)), max_size=60))
def test_whatever_comes_and_goes_all_blocks_return(steps: list[tuple[int, int]]) -> None:
    kv, held = Reservations(20, 16), set[int]()
    for id, tokens in steps:
        if id in held:
            kv.release(id)
            held.discard(id)
        elif kv.can_hold(tokens):
            kv.hold(id, tokens)
            held.add(id)
        assert 0 <= kv.free_blocks <= 20
    for id in held:
        kv.release(id)
    assert (kv.free_tokens, kv.usage) == (320, 0.0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.lists(st.integers(0, 3), min_size=1, max_size=80))
def test_the_cache_answers_for_the_common_whole_blocks_and_never_for_the_last_token(a: list[int], b: list[int]) -> None:
    model = PrefixModel(100, 4)
    model.learn(a)
    common = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    assert model.cached_tokens(b) == min(common // 4 * 4, (len(b) - 1) // 4 * 4)


def test_the_prefix_model_forgets_the_least_recently_used() -> None:
    model = PrefixModel(3, 2)
    model.learn([1, 1, 2, 2])
    model.learn([3, 3, 4, 4])
    assert model.cached_tokens([1, 1, 9]) == 0
    assert model.cached_tokens([3, 3, 4, 4, 9]) == 4


@given(st.floats(1, 1e7), st.floats(0.001, 10))
def test_a_chunk_is_whole_blocks_within_its_bounds(rate: float, tpot_s: float) -> None:
    chunk = calibrate.chunk_tokens(rate, tpot_s)
    assert chunk % 32 == 0
    assert 32 <= chunk <= 2048
    assert chunk / rate <= 2 * tpot_s or chunk == 32


@pytest.mark.parametrize("broken", [b"{", b'{"\xff": 1}'])
def test_a_calibration_survives_a_restart_and_a_broken_file(
    broken: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = str(tmp_path / "cache")
    assert calibrate.recall(cache, "a") is None
    calibrate.keep(cache, "a", Calibration(1234.0))
    calibrate.keep(cache, "b", Calibration(5.0))
    assert calibrate.recall(cache, "a") == Calibration(1234.0)
    (tmp_path / "cache" / calibrate.FILE).write_bytes(broken)
    assert calibrate.recall(cache, "a") is None
    assert "calibrating anew" in capfd.readouterr().err


def test_calibrations_kept_are_bounded(tmp_path: Path) -> None:
    for i in range(calibrate.KEPT + 3):
        calibrate.keep(str(tmp_path), str(i), Calibration(1.0))
    assert calibrate.recall(str(tmp_path), "0") is None
    assert calibrate.recall(str(tmp_path), str(calibrate.KEPT + 2)) == Calibration(1.0)


def test_a_block_of_kv_memory_is_as_large_as_the_library_reports() -> None:
    pipeline = pytest.importorskip("neaptide.engine.openvino_pipeline", reason="the extra `cpu` is not installed")
    guide = directory.read(GUIDE)
    shape = msgspec.structs.replace(guide, layers=2, kv_heads=2, head_dim=64)
    assert pipeline.block_bytes(shape) == 19456
