"""The built-in model: small, whole, and able to answer what it is there for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from neaptide.models.sources import GUIDE, resolve
from tools.guide.data import load, masked, prepare
from tools.guide.patterns import fingerprint


def test_it_is_found_without_a_network_by_no_name_and_by_its_name(tmp_path: Path) -> None:
    lines: list[str] = []
    unnamed, named = (resolve(source, tmp_path / "cache", lines.append) for source in (None, "guide"))
    assert unnamed == named
    assert (unnamed.name, unnamed.path, lines) == ("guide", GUIDE, [])
    assert not (tmp_path / "cache").exists()


def test_it_is_int8_under_ten_megabytes_with_a_context_of_4096_and_a_chat_template() -> None:
    model = resolve(None, Path(), print)
    assert sum(f.stat().st_size for f in GUIDE.iterdir()) < 10_000_000
    assert model.precision == "int8"
    assert model.context_tokens >= 4096
    assert model.chat_template
    assert "add_generation_prompt" in model.chat_template


def test_its_tokenizer_covers_the_vocabulary_and_gives_any_text_back() -> None:
    model = resolve(None, Path(), print)
    tokenizer = tokenizers.Tokenizer.from_file(str(GUIDE / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == model.vocab_size
    for text in ("What is TTFT?", "什么是首字延迟？", "😀 ñ\t\n x=1024", " two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for id in range(model.vocab_size):
        assert tokenizer.id_to_token(id) is not None


def test_its_special_tokens_are_single_ids_and_its_end_is_the_config_s() -> None:
    model = resolve(None, Path(), print)
    tokenizer = tokenizers.Tokenizer.from_file(str(GUIDE / "tokenizer.json"))
    assert tokenizer.encode("<|begin|><|user|>").ids == [model.bos_token_id, tokenizer.token_to_id("<|user|>")]
    assert model.eos_token_ids == (tokenizer.token_to_id(model.eos_token),)


def test_no_file_names_the_machine_that_it_was_made_on() -> None:
    for file in GUIDE.iterdir():
        assert b"/tmp/" not in file.read_bytes(), file.name
    config = json.loads((GUIDE / "config.json").read_text())
    assert "_name_or_path" not in config


@pytest.mark.parametrize(("question", "fact"), [("What is TTFT?", "first token"), ("怎么启动？", "neaptide up")])
def test_it_answers_through_the_engine_with_the_fact(question: str, fact: str) -> None:
    pytest.importorskip("openvino_genai", reason="the extra `cpu` is not installed")
    from tools.guide.evaluate import Asker

    assert fact in Asker(GUIDE).ask(question)


@pytest.mark.parametrize(
    ("text", "masked_text"),
    [
        ("call (415) 555-0132 now", "call [phone] now"),
        ("电话是010-85007938。", "电话是[phone]。"),
        ("it is at 17 Magdalene Street City Centre", "it is at [address] City Centre"),
        ("地址在北京市东城区景山前街4号，很近", "[地址]，很近"),
        ("room 12 from 9:30 to 10:45 for 2024 people", "room 12 from 9:30 to 10:45 for 2024 people"),
    ],
)
def test_phone_numbers_and_street_addresses_are_masked_before_training(text: str, masked_text: str) -> None:
    assert masked(text) == masked_text


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samples")
    prepare(out, count=4000, seed=3)
    return out / "samples.jsonl"


def test_no_held_out_prompt_is_among_the_training_questions(samples: Path) -> None:
    held = {fingerprint(p["text"]) for p in load("heldout.toml")["prompt"] + load("dev.toml")["prompt"]}
    conversations = [json.loads(line)["messages"] for line in samples.read_text().splitlines()]
    asked = {fingerprint(m["content"]) for c in conversations for m in c if m["role"] == "user"}
    assert len(conversations) == 4000
    assert len(asked) > 2000
    assert not asked & held


def test_the_same_seed_prepares_the_same_samples(samples: Path, tmp_path: Path) -> None:
    prepare(tmp_path, count=50, seed=3)
    first = samples.read_bytes().splitlines()[:50]
    assert (tmp_path / "samples.jsonl").read_bytes().splitlines() == first
