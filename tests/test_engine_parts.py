"""The engine's pure parts: KV accounting, the prefix model, calibration, what a model directory says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.engine import calibrate, model_files
from neaptide.engine.blocks import PrefixModel, Reservations
from neaptide.engine.calibrate import Calibration
from neaptide.errors import ModelError

CONFIG = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 8192,
    "max_position_embeddings": 4096, "eos_token_id": 2,
}  # fmt: skip


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


def test_a_calibration_survives_a_restart_and_a_broken_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache = str(tmp_path / "cache")
    assert calibrate.recall(cache, "a") is None
    calibrate.keep(cache, "a", Calibration(1234.0))
    calibrate.keep(cache, "b", Calibration(5.0))
    assert calibrate.recall(cache, "a") == Calibration(1234.0)
    (tmp_path / "cache" / calibrate.FILE).write_text("{")
    assert calibrate.recall(cache, "a") is None
    assert "calibrating anew" in capfd.readouterr().err


def test_calibrations_kept_are_bounded(tmp_path: Path) -> None:
    for i in range(calibrate.KEPT + 3):
        calibrate.keep(str(tmp_path), str(i), Calibration(1.0))
    assert calibrate.recall(str(tmp_path), "0") is None
    assert calibrate.recall(str(tmp_path), str(calibrate.KEPT + 2)) == Calibration(1.0)


def model(directory: Path, config: object = CONFIG) -> Path:
    for name in (model_files.MODEL, model_files.WEIGHTS):
        (directory / name).write_bytes(b"x")
    (directory / model_files.CONFIG).write_bytes(msgspec.json.encode(config))
    return directory


def test_a_model_directory_tells_its_shape(tmp_path: Path) -> None:
    files = model_files.read(str(model(tmp_path)))
    assert (files.context_tokens, files.vocab_size, files.head_dim, files.kv_heads) == (4096, 8192, 64, 2)
    assert files.eos_ids == {2}
    assert files.kv_block_bytes == 19456, "what the library reports for this shape"


def test_the_generation_config_has_the_last_word_on_the_end(tmp_path: Path) -> None:
    (model(tmp_path) / model_files.GENERATION).write_text('{"eos_token_id": [5, 6]}')
    assert model_files.read(str(tmp_path)).eos_ids == {5, 6}


@pytest.mark.parametrize("config", [{}, {**CONFIG, "hidden_size": None}, {**CONFIG, "vocab_size": "many"}])
def test_a_config_that_is_no_decoder_names_the_file(tmp_path: Path, config: object) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        model_files.read(str(model(tmp_path, config)))
