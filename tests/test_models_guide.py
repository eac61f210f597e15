"""The built-in model: small, whole, and able to answer what it is there for."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers

from neaptide.models.sources import GUIDE, resolve
from tools.guide.bank import HERE, kept_back, load, prompts, topics
from tools.guide.booking import Dialogue
from tools.guide.data import prepare
from tools.guide.patterns import expand, fingerprint
from tools.guide.sources import masked


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


def test_no_held_out_question_is_among_the_training_questions(samples: Path) -> None:
    conversations = [json.loads(line)["messages"] for line in samples.read_text().splitlines()]
    asked = {fingerprint(m["content"]) for c in conversations for m in c if m["role"] == "user"}
    assert len(conversations) == 4000
    assert len(asked) > 2000
    assert not asked & kept_back()


def test_a_fifth_of_the_turns_are_to_be_declined_and_bookings_and_follow_ups_are_there(samples: Path) -> None:
    conversations = [json.loads(line) for line in samples.read_text().splitlines()]
    replies = [m["content"] for c in conversations for m in c["messages"] if m["role"] == "assistant"]
    declined = sum("don't know" in r or "不知道" in r for r in replies)
    assert 0.12 < declined / len(replies) < 0.22
    assert sum(c["kind"] == "booking" for c in conversations) > 150
    more = {a for t in topics() for lang in ("en", "zh") for a in t.get(f"{lang}_more_answers", ())}
    assert sum(r in more for r in replies) > 150


def test_every_subject_has_a_topic_in_two_languages_that_asks_it_in_forty_ways_or_more() -> None:
    subjects = {name for group in load("subjects.toml").values() for name in group} - {"booking"}
    found = topics()
    assert len(found) == len(subjects) >= 60
    assert {t["id"] for t in found} == subjects
    rng = random.Random(1)
    for topic in found:
        for lang in ("en", "zh"):
            lines = topic[lang].strip().split("\n")
            asked = {fingerprint(expand(rng.choice(lines), rng)) for _ in range(300)}
            assert len(asked) >= 40, (topic["id"], lang)
            assert topic[f"{lang}_answers"], topic["id"]


def test_the_held_out_list_asks_every_subject_in_both_languages_and_sixty_questions_to_decline() -> None:
    held = prompts("heldout.toml")
    for lang in ("en", "zh"):
        mine = [p for p in held if p.get("home", p["lang"]) == lang]
        assert sum(p["kind"] == "answer" for p in mine) == 128
        assert sum(p["kind"] == "chat" for p in mine) == 20
        assert {p["subject"] for p in mine if p["kind"] == "answer"} >= {
            name for group, names in load("subjects.toml").items() if group != "talk" for name in names
        }
    assert sum(p["kind"] == "refuse" for p in held) == 60


def test_a_suggestion_is_asked_in_each_language_and_ships_with_the_model() -> None:
    chips = json.loads((GUIDE / "chips.json").read_text(encoding="utf-8"))
    assert (GUIDE / "chips.json").read_bytes() == (HERE / "chips.json").read_bytes()
    assert {lang: len(texts) for lang, texts in chips.items()} == {"en": 6, "zh": 6}


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_booking_s_last_answer_repeats_all_that_the_guest_gave(lang: str) -> None:
    for seed in range(200):
        dialogue = Dialogue(lang, random.Random(seed))
        messages = dialogue.play()
        last = messages[-1]["content"]
        if last not in (dialogue.texts["cancelled"], dialogue.texts["welcome"]):
            assert all(value in last for value in dialogue.known.values()), messages
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)


def test_the_same_seed_prepares_the_same_samples(samples: Path, tmp_path: Path) -> None:
    prepare(tmp_path, count=50, seed=3)
    first = samples.read_bytes().splitlines()[:50]
    assert (tmp_path / "samples.jsonl").read_bytes().splitlines() == first
