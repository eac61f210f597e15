"""Tokens to text: no half characters, stop strings cut wherever they fall, a resume told only what it lacks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from neaptide.engine.text import Stops, Text
from neaptide.engine.tokens import ByteTokenizer, ModelTokenizer

LETTERS = "ab "


def byte_level() -> Tokenizer:
    """A byte-level BPE tokenizer: all 256 bytes, a few merges, a special and an ordinary added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2: metaspace words, byte fallback, a leading space that decoding strips."""
    vocabulary = [("<unk>", 0.0), ("▁", -2.0), ("▁he", -1.0), ("llo", -1.0), ("é", -3.0), ("a", -2.0), ("b", -2.0)]
    vocabulary += [(f"<0x{b:02X}>", -9.0) for b in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL, SENTENCE_PIECE = byte_level(), sentence_piece()
SIZE = BYTE_LEVEL.get_vocab_size()


def shown(text: Text, groups: Sequence[Sequence[int]]) -> str:
    """What a client sees of tokens that come in these groups."""
    out = []
    for group in groups:
        out.append(text.push(group))
        if text.stopped:
            break
    return "".join(out) + text.finish()


def cut(whole: str, stops: Sequence[str]) -> str:
    """The plain version: the stop that completes first ends the text where it begins."""
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    return whole[: min(ends)[1]] if ends else whole


def grouped(ids: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    groups, at = [], 0
    for size in sizes:
        groups.append(ids[at : at + size])
        at += size
    return [*groups, ids[at:]]


sizes = st.lists(st.integers(1, 4), max_size=40)


@given(st.lists(st.integers(0, 257), max_size=40), sizes)
@example([0xF0, 0x9F, 0x98, 0x80], [1, 1, 1, 1])
@example([0xE4, 0xB8], [1])
def test_bytes_in_any_grouping_are_the_text_of_the_whole(ids: list[int], sizes: list[int]) -> None:
    whole = bytes(i for i in ids if i < 256).decode("utf-8", "replace")
    assert shown(Text(ByteTokenizer().decoder()), grouped(ids, sizes)) == whole


@given(st.lists(st.integers(0, SIZE + 3), max_size=40), sizes)
def test_byte_level_tokens_decode_as_the_tokenizer_decodes_the_whole(ids: list[int], sizes: list[int]) -> None:
    tokenizer = ModelTokenizer(BYTE_LEVEL)
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=True)
    assert shown(Text(tokenizer.decoder()), grouped(ids, sizes)) == whole


@settings(deadline=None)
@given(st.text(max_size=30), sizes)
@example("héllo hello 😀 hello", [])
def test_sentence_pieces_decode_as_the_tokenizer_decodes_the_whole(text: str, sizes: list[int]) -> None:
    tokenizer = ModelTokenizer(SENTENCE_PIECE)
    ids = tokenizer.encode(text.encode("utf-8", "replace").decode(), True)
    whole = SENTENCE_PIECE.decode(ids, skip_special_tokens=True)
    assert shown(Text(tokenizer.decoder()), grouped(ids, sizes)) == whole


@settings(deadline=None)
@given(st.lists(st.integers(0, 262), max_size=60))
@example([7 + 0xFF] * 60)
@example([7 + 0xF0, 7 + 0x9F] * 30 + [5])
@example([7 + 0xC3, 7 + 0xA9, 7 + 0xFF, 7 + 0xFE])
def test_broken_bytes_neither_stall_nor_break_a_fallback_vocabulary(ids: list[int]) -> None:
    # Byte fallback replaces a whole run of bytes once one of them is broken, so what was told of the run may differ.
    text = Text(ModelTokenizer(SENTENCE_PIECE).decoder())
    after = [text.push([i]) for i in [*ids, *SENTENCE_PIECE.encode("a hello b").ids]]
    assert ("".join(after) + text.finish()).endswith(" hello b")


def test_a_long_run_of_broken_bytes_is_shown_before_it_ends() -> None:
    text = Text(ModelTokenizer(SENTENCE_PIECE).decoder())
    assert "\ufffd" in "".join(text.push([7 + 0xFF]) for _ in range(100))


def test_no_half_character_is_ever_shown() -> None:
    text = Text(ByteTokenizer().decoder())
    seen = [text.push([b]) for b in "é😀x".encode()]
    assert seen == ["", "é", "", "", "", "😀", "x"]
    assert text.finish() == ""


def test_an_unfinished_character_at_the_end_is_shown_as_replaced() -> None:
    text = Text(ByteTokenizer().decoder())
    assert text.push([0x61, 0xC3]) == "a"
    assert text.finish() == "\ufffd"


stop_lists = st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=4)


@given(st.text(LETTERS, max_size=40), stop_lists, sizes)
@example("aab", ["ab"], [1, 1, 1])
@example("aaab", ["aab", "b"], [1, 1])
@example("xab", ["ab", "xabc"], [])
def test_text_is_cut_at_the_stop_that_completes_first_however_tokens_fall(
    whole: str, stops: list[str], sizes: list[int]
) -> None:
    text = Text(ByteTokenizer().decoder(), stops)
    assert shown(text, grouped(whole.encode(), sizes)) == cut(whole, stops)
    assert text.stopped == any(s in whole for s in stops)


@given(st.text(LETTERS, max_size=30), stop_lists)
def test_only_what_may_become_a_stop_is_held_back(whole: str, stops: list[str]) -> None:
    matcher, out = Stops(stops), ""
    for c in whole:
        text, found = matcher.push(c)
        out += text
        if found:
            return
        held = matcher._held
        assert held == "" or any(s.startswith(held) and s != held for s in stops)
    assert out + matcher.flush() == whole


@given(
    st.text("ab é", min_size=1, max_size=30), st.lists(st.text("abé", min_size=1, max_size=3), max_size=2),
    st.integers(0, 40), st.integers(0, 40), sizes,
)  # fmt: skip
def test_a_resumed_answer_shows_exactly_what_the_client_lacks(
    whole: str, stops: list[str], generated: int, emitted: int, sizes: list[int]
) -> None:
    ids = list(whole.encode())
    generated = min(generated, len(ids))
    complete = cut(whole, stops)
    told = min(emitted, len(cut(bytes(ids[:generated]).decode("utf-8", "ignore"), stops)))
    text = Text(ByteTokenizer().decoder(), stops, ids[:generated], told)
    rest = [] if text.stopped else grouped(ids[generated:], sizes)
    assert complete[:told] + shown(text, rest) == complete


DECODERS: list[ByteTokenizer | ModelTokenizer] = [
    ByteTokenizer(),
    ModelTokenizer(BYTE_LEVEL),
    ModelTokenizer(SENTENCE_PIECE),
]


@settings(deadline=None)
@given(
    st.sampled_from(DECODERS), st.text("ab helo w é😀", max_size=30),
    st.lists(st.text("abhelo é", min_size=1, max_size=3), max_size=2),
    st.integers(0, 60), sizes, sizes,
)  # fmt: skip
@example(DECODERS[0], "a😀b", [], 3, [], [])
@example(DECODERS[2], "hello hello", ["lo h"], 3, [1], [1])
def test_whose_client_has_all_that_the_ids_show_is_told_the_rest_however_tokens_fall(
    tokenizer: ByteTokenizer | ModelTokenizer, said: str, stops: list[str], at: int, before: list[int], after: list[int]
) -> None:
    ids = tokenizer.encode(said, False)
    first = Text(tokenizer.decoder(), stops)
    told = ""
    for group in grouped(ids[:at], before):  # the replica that is lost never finishes
        told += first.push(group) if not first.stopped else ""
    rest = Text(tokenizer.decoder(), stops, ids[:at], None)
    assert (rest.known_chars, rest.stopped) == (len(told), first.stopped)
    told += shown(rest, [] if rest.stopped else grouped(ids[at:], after))
    assert told == shown(Text(tokenizer.decoder(), stops), [ids])


def test_special_tokens_and_unknown_ids_show_nothing() -> None:
    tokenizer = ModelTokenizer(BYTE_LEVEL)
    end = BYTE_LEVEL.token_to_id("<|end|>")
    text = Text(tokenizer.decoder())
    assert text.push([*tokenizer.encode("hello", True), end, SIZE + 100]) == "hello"
    assert tokenizer.token_bytes(end) == b"<|end|>"


@pytest.mark.parametrize("word", ["hello", "é", " w", "<think>"])
def test_a_token_tells_its_bytes(word: str) -> None:
    for inner in (BYTE_LEVEL, SENTENCE_PIECE):
        tokenizer = ModelTokenizer(inner)
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(word, False))).strip() == word.encode().strip()


def test_a_model_tells_its_reasoning_tokens() -> None:
    tokenizer = ModelTokenizer(BYTE_LEVEL)
    assert tokenizer.think_open == BYTE_LEVEL.token_to_id("<think>")
    assert ByteTokenizer().think_close is None
