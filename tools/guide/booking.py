"""The booking demo's dialogues: the guide collects people, day and time, repeats what it has noted each turn, and says
at the end that nothing was booked. It shows that earlier turns are used: what was noted is copied from them. No name is
asked for; guests give one all the same, and it is not repeated.

Each answer states all that is noted, so that what must be copied stands in the turn before.
"""

from __future__ import annotations

import random
import string
import tomllib
from pathlib import Path

from tools.guide.patterns import expand, noisy

TEXTS = tomllib.loads((Path(__file__).parent / "booking.toml").read_text(encoding="utf-8"))
VALUES = TEXTS["values"]
SLOTS = ("people", "day", "time")
OPENINGS = {
    "open": ((), 3),
    "open_people": (("people",), 2),
    "open_day": (("day",), 1),
    "open_two": (("people", "day"), 2),
    "open_three": (SLOTS, 2),
    "open_all": (SLOTS, 1),  # and a name
}  # how a dialogue begins: what it gives, how often
PAIRS = (("people", "day"), ("day", "time"))  # slots that guests give together


class Dialogue:
    """One guest and the guide; `messages` after play()."""

    def __init__(self, lang: str, rng: random.Random) -> None:
        self.lang, self.rng, self.texts = lang, rng, TEXTS[lang]
        self.known: dict[str, str] = {}
        self.messages: list[dict[str, str]] = []

    def play(self) -> list[dict[str, str]]:
        self._open()
        while missing := self._missing():
            if self.rng.random() < 0.04:
                self._say(self.texts["cancel"], {}, self.texts["cancelled"])
                return self.messages
            self._more(missing)
        self._close()
        return self.messages

    def _open(self) -> None:
        kinds = list(OPENINGS)
        kind = self.rng.choices(kinds, [OPENINGS[k][1] for k in kinds])[0]
        given = self._take(OPENINGS[kind][0])
        self._say(self.texts[kind], given, self._answer())

    def _more(self, missing: list[str]) -> None:
        """The guest answers the question, says two things at once, or changes their mind."""
        draw = self.rng.random()
        changeable = list(self.known)
        pair = next((p for p in PAIRS if p[0] == missing[0] and p[1] in missing), None)
        if draw < 0.12 and changeable:
            slot = self.rng.choice(changeable)
            self._say(self.texts[f"change_{slot}"], self._take((slot,)), self._answer())
        elif draw < 0.3 and pair is not None:
            self._say(self.texts["_".join(pair)], self._take(pair), self._answer())
        else:
            named = missing == ["time"] and self.rng.random() < 0.15
            said = self.texts["time_name" if named else missing[0]]
            self._say(said, self._take(missing[:1]), self._answer())

    def _close(self) -> None:
        """After the last answer: a name, a change, a question, thanks, or nothing."""
        if self.rng.random() < 0.25:
            self._say(self.texts["name"], {}, self._answer())
        for _ in range(self.rng.choice((0, 0, 1, 1, 2))):
            draw = self.rng.random()
            if draw < 0.4:
                slot = self.rng.choice(SLOTS)
                self._say(self.texts[f"change_{slot}"], self._take((slot,)), self._answer())
            elif draw < 0.75:
                self._say(self.texts["ask"], {}, self._answer())
            else:
                last, answer = (("thanks", "welcome"), ("cancel", "cancelled"))[draw > 0.9]
                self._say(self.texts[last], {}, self.texts[answer])
                return

    def _say(self, patterns: list[str], given: dict[str, str], answer: str) -> None:
        slots = {slot: [value] for slot, value in given.items()} | {"name": [_name(self.lang, self.rng)]}
        said = expand(self.rng.choice(patterns), self.rng, slots)
        if patterns is self.texts["open"]:
            said = noisy(said, self.lang, self.rng)
        self.messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]

    def _take(self, slots: tuple[str, ...] | list[str]) -> dict[str, str]:
        given = {slot: value(slot, self.lang, self.rng) for slot in slots}
        self.known |= given
        return given

    def _missing(self) -> list[str]:
        return [slot for slot in SLOTS if slot not in self.known]

    def _answer(self) -> str:
        """All that is noted, then the next question; the whole booking at the end."""
        texts, missing = self.texts, self._missing()
        parts = [self._stated(slot) for slot in SLOTS if slot in self.known]
        if not missing:
            return str(texts["done"]).replace("{all}", texts["joint"].join(parts))
        gap = " " if self.lang == "en" else ""
        question = texts[f"ask_{missing[0]}"]
        if not parts:
            return f"{texts['first']}{gap}{question}"
        return f"{texts['noted']}{texts['joint'].join(parts)}{'.' if gap else '。'}{gap}{question}"

    def _stated(self, slot: str) -> str:
        form = str(self.texts.get(f"say_{slot}", "{" + slot + "}"))
        return form.replace("{" + slot + "}", self.known[slot])


def value(slot: str, lang: str, rng: random.Random) -> str:
    """What a guest might give for `slot`; it is repeated as it was given."""
    return {"people": _people, "day": _day, "time": _time}[slot](lang, rng)


def _people(lang: str, rng: random.Random) -> str:
    n = rng.choices(range(2, 21), [19 - i if i < 9 else 2 for i in range(19)])[0]
    if lang == "zh":
        number = VALUES["zh_numbers"][n - 2] if n <= 10 and rng.random() < 0.6 else str(n)
        return number + rng.choice(("个人", "人", "位"))
    return VALUES["en_numbers"][n - 2] if n <= 12 and rng.random() < 0.4 else str(n)


def _day(lang: str, rng: random.Random) -> str:
    draw = rng.random()
    if lang == "zh":
        if draw < 0.35:
            return rng.choice(("今天", "明天", "后天", "今晚", "明晚", "大后天"))
        if draw < 0.75:
            return rng.choice(("", "这", "下", "本")) + rng.choice(("周", "星期")) + rng.choice(VALUES["zh_days"])
        return f"{rng.randint(1, 12)}月{rng.randint(1, 31)}" + rng.choice("号日")
    if draw < 0.25:
        return rng.choice(("today", "tomorrow", "tonight", "the day after tomorrow"))
    if draw < 0.75:
        return rng.choice(("", "on ", "next ", "this ")) + rng.choice(VALUES["en_days"])
    return rng.choice((f"on {rng.choice(VALUES['en_months'])} {rng.randint(1, 31)}", f"on the {rng.randint(4, 20)}th"))


def _time(lang: str, rng: random.Random) -> str:
    draw, hour = rng.random(), rng.randint(11, 22)
    if lang == "zh":
        if draw < 0.3:
            return f"{hour}:{rng.choice(('00', '15', '30', '45'))}"
        part = "中午" if hour < 14 else "下午" if hour < 18 else "晚上"
        spoken = str(hour if hour <= 12 else hour - 12)
        return (part if rng.random() < 0.7 else "") + spoken + rng.choice(("点", "点", "点半", "点一刻"))
    if draw < 0.4:
        return f"{hour}:{rng.choice(('00', '15', '30', '45'))}"
    clock = hour if hour <= 12 else hour - 12
    if draw < 0.8:
        return f"{clock}{rng.choice(('', ':30', ':15', ':45'))}{rng.choice((' ', ''))}{'am' if hour < 12 else 'pm'}"
    return rng.choice((f"{clock} o'clock", f"half past {clock}"))


def _name(lang: str, rng: random.Random) -> str:
    if lang == "zh":
        given = "".join(rng.sample(VALUES["given"], rng.choice((1, 2, 2))))
        return rng.choice(VALUES["surnames"]) + (given if rng.random() < 0.8 else rng.choice(("先生", "女士", "小姐")))
    name = _made_up(rng)
    if rng.random() < 0.2:
        name = rng.choice(string.ascii_uppercase) + ". " + name
    elif rng.random() < 0.3:
        name += " " + _made_up(rng)
    return rng.choice(VALUES["titles"]) + name if rng.random() < 0.08 else name


def _made_up(rng: random.Random) -> str:
    return "".join(rng.choice(VALUES[part]) for part in ("starts", "middles", "ends"))
