"""What two questions must share before their meaning is even compared. Pure; English only.

Vectors of "10 USD" and "100 USD", or of "safe" and "unsafe", lie as close as those of a paraphrase. So numbers, names,
negations and directions must be the same first; what differs in one of them is no hit, however near.

    difference(marks("Is it safe?"), marks("Is it unsafe?")) -> "negation"
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_QUOTED = re.compile(r"[\"`]([^\"`]{1,200})[\"`]|(?<!\w)'([^'\n]{1,200})'(?!\w)")
_SYMBOLS = re.compile(r"[^\s\w.,;:!?'\"()`-]+|(?<=\w)[+#]+|--?\w[\w-]*|\w*[_/\\@.]\w[\w/\\@.]*")
_FOREIGN = re.compile(r"[^\u0000-\u024f\u2000-\u206f\u20a0-\u20cf]")  # beyond Latin: the embedder knows English
_ENDS = re.compile(r"[.!?]\s+$|^\s*$")


def _words(text: str) -> list[str]:
    return text.split()


_COUNTS = {
    word: str(number)
    for number, words in enumerate(
        _words(
            "zero one/once/single two/twice/both/double/pair three/thrice/triple four five six seven eight nine ten"
            " eleven twelve/dozen thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
        )
    )
    for word in words.split("/")
} | {
    word: f"{number}."
    for number, word in enumerate(_words("second third fourth fifth sixth seventh eighth ninth tenth"), start=2)
}
_SCALES = frozenset(
    _words(
        "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion half quarter"
        " percent seconds minute minutes hour hours day days week weeks month months year years"
    )
)
_NEGATIONS = frozenset(
    _words(
        "no not never none nobody nothing nowhere neither nor without cannot cant dont wont isnt arent doesnt didnt"
        " wasnt werent shouldnt couldnt wouldnt hasnt havent hadnt except unless lack lacks lacking fail fails failed"
        " avoid prevent prevents exclude excluding refuse refuses other"
    )
)
_PREFIX = re.compile(r"^(?:un|in|im|ir|il|dis|non|mis|de|anti)-?(?=\w{3})")
_ROOTS = frozenset(
    _words(
        "safe able available aware certain clear common complete conscious correct healthy happy important known"
        " legal likely limited lock lucky necessary official pack popular possible reliable secure stable successful"
        " sure tested true usual used valid visible wanted well zip active accurate adequate appropriate capable"
        " compatible consistent convenient credible definite dependent direct effective efficient expensive finite"
        " formal frequent sane sensitive significant sufficient tolerant variable mature mobile moral mutable patient"
        " perfect personal polite practical precise proper pure rational regular relevant replaceable resistible"
        " respective responsible agree allow allowed appear approve arm assemble associate connect continue cover"
        " enable enabled engage honest infect integrate like locate mount obey order own place prove qualify regard"
        " respect satisfied trust alcoholic blocking empty existent fiction linear profit smoking stop trivial zero"
        " fat toxic vegetarian behave configured lead leading match print pronounce read represent spell take"
        " understand use activate allocate compile compose compress couple crypt duplicate fault generate grade"
        " hydrate magnetise normalise populate serialize serialise stabilise value virus social body septic edible"
        " eligible equal essential fair familiar finished forgettable fortunate friendly grateful helpful intentional"
        " interesting interested married natural paid pleasant productive professional qualified realistic reasonable"
        " related restricted signed solved stoppable supervised supported surprising suitable taxed tidy typical"
        " usable verified willing written"
    )
)
_OPPOSITES = (
    "more/less/fewer most/least max/min maximum/minimum highest/lowest high/low higher/lower large/small"
    " larger/smaller largest/smallest big/little long/short longer/shorter longest/shortest fast/slow faster/slower"
    " fastest/slowest early/late earlier/later earliest/latest before/after first/last old/new/young"
    " older/newer/younger oldest/newest/youngest good/bad better/worse best/worst cheap/expensive"
    " increase/decrease/reduce increasing/decreasing/reducing increases/decreases/reduces raise/lower up/down"
    " upgrade/downgrade start/stop/restart begin/end open/close enable/disable enabled/disabled on/off in/out"
    " input/output inputs/outputs inside/outside into/from left/right north/south/east/west top/bottom above/below"
    " over/under front/back add/remove insert/delete create/delete/update buy/sell import/export send/receive"
    " push/pull give/take lend/borrow win/lose gain/lose profit/loss pros/cons benefits/drawbacks"
    " advantages/disadvantages advantage/disadvantage hot/cold warm/cool day/night morning/evening/afternoon am/pm"
    " today/tomorrow/yesterday past/future/present male/female man/woman men/women boy/girl he/she his/her"
    " father/mother son/daughter husband/wife accept/reject allow/deny/forbid include/exclude attach/detach"
    " connect/disconnect lock/unlock encrypt/decrypt encode/decode compress/decompress install/uninstall"
    " mount/unmount upload/download read/write public/private synchronous/asynchronous sync/async horizontal/vertical"
    " horizontally/vertically client/server parent/child ascending/descending always/sometimes all/some/any"
    " every/each many/few much/little legal/illegal love/hate safe/dangerous healthy/sick alive/dead rich/poor"
    " strong/weak heavy/light wet/dry hard/soft difficult/easy arrive/depart arrival/departure enter/exit"
    " entrance/exit same/different odd/even positive/negative plus/minus multiply/divide hire/fire next/previous"
    " local/remote own/others who/when/where"
)
_SIDES: dict[str, tuple[tuple[str, int], ...]] = {}
for _pair in _words(_OPPOSITES):
    for _side, _word in enumerate(_pair.split("/")):
        _SIDES[_word] = (*_SIDES.get(_word, ()), (_pair, _side))


class Marks(NamedTuple):
    """What a question must have in common with another. Order counts: from 3 to 5 is not from 5 to 3."""

    numbers: tuple[str, ...]
    names: tuple[str, ...]  # capitals within a sentence, acronyms, quotations, code
    negations: int
    sides: frozenset[tuple[str, int]]  # which word of a pair of opposites
    foreign: bool
    words: frozenset[str]  # not compared: how many are shared is evidence, of which the belief learns what it means


def marks(text: str) -> Marks:
    plain = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    words = [word.group().lower().replace("'", "") for word in _WORD.finditer(plain)]
    numbers = tuple(_numbers(plain))
    negations = sum(word in _NEGATIONS for word in words) + sum(_negated(word) for word in words)
    sides = frozenset(side for word in words for side in _SIDES.get(word, ()))
    return Marks(numbers, tuple(_names(plain)), negations, sides, bool(_FOREIGN.search(plain)), frozenset(words))


def difference(one: Marks, other: Marks) -> str:
    """What tells two questions apart, for the log and the metrics; "" where nothing does."""
    if one.foreign or other.foreign:
        return "language"
    if one.numbers != other.numbers:
        return "numbers"
    if one.names != other.names:
        return "names"
    if one.negations % 2 != other.negations % 2:
        return "negation"
    if _opposed(one.sides, other.sides):
        return "opposites"
    return ""


def _opposed(one: frozenset[tuple[str, int]], other: frozenset[tuple[str, int]]) -> bool:
    """Both hold words of a pair, and not the same ones."""
    pairs = {pair for pair, _ in one} & {pair for pair, _ in other}
    return any({s for p, s in one if p == pair} != {s for p, s in other if p == pair} for pair in pairs)


def _numbers(text: str) -> Iterator[str]:
    for found in re.finditer(rf"{_NUMBER.pattern}|{_WORD.pattern}", text):
        word = found.group().lower()
        if word[0].isdigit():
            yield word
        elif word in _COUNTS:
            yield _COUNTS[word]
        elif word in _SCALES:
            yield word.removesuffix("s")


def _names(text: str) -> Iterator[str]:
    """In the order in which they stand."""
    found = [(m.start(), (m.group(1) or m.group(2)).strip().lower()) for m in _QUOTED.finditer(text)]
    found += [(m.start(), m.group().lower().rstrip(".")) for m in _SYMBOLS.finditer(text)]
    for word in _WORD.finditer(text):
        token, before = word.group(), text[: word.start()]
        if token in ("I", "A") or token.startswith("I'"):
            continue
        inner = any(c.isupper() for c in token[1:])
        if inner or (token[0].isupper() and not _ENDS.search(before)):
            found.append((word.start(), token.lower()))
    return (name for _, name in sorted(set(found)) if name)


def _negated(word: str) -> bool:
    """A negating prefix before a word that stands by itself often enough: unsafe, disallow, non-stop."""
    return bool(_PREFIX.match(word)) and _PREFIX.sub("", word, count=1) in _ROOTS
