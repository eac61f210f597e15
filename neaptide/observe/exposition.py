"""Prometheus' text format (0.0.4), read for one metric: `name{label="value", ...} value timestamp`, one a line.

Only lines of that metric are judged, strictly; what else an exporter writes is none of ours.
"""

from __future__ import annotations

import re
from typing import NamedTuple

METRIC = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
PAIR = re.compile(rf'(?P<label>{LABEL.pattern})[ \t]*=[ \t]*"(?P<value>(?:[^"\\]|\\[\\n"])*)"')
SEPARATOR = r"[ \t]*(?:,[ \t]*|(?=\}))"  # a comma may stand behind the last pair, too
NUMBER = r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|Inf|NaN)"
REST = re.compile(  # of a line, behind the name; the timestamp is another host's clock, and read over
    r"(?:[ \t]*\{[ \t]*(?P<pairs>(?:" + re.sub(r"\?P<\w+>", "?:", PAIR.pattern) + SEPARATOR + r")*)\}[ \t]*|[ \t]+)"
    rf"(?P<number>{NUMBER})(?:[ \t]+-?[0-9]+)?[ \t]*\r?"
)
ESCAPED = re.compile(r"\\(.)")


class Sample(NamedTuple):
    labels: dict[str, str]
    value: float  # may be NaN or infinite


def samples(text: str, metric: str) -> list[Sample]:
    """Every sample of `metric`, in the text's order. ValueError: cut off, a line that is none, or one that stands
    twice."""
    if text and not text.endswith("\n"):
        raise ValueError("it ends in the middle of a line")
    name = re.compile(rf"[ \t]*{re.escape(metric)}(?![a-zA-Z0-9_:])")
    found: dict[frozenset[tuple[str, str]], Sample] = {}
    for line in text.split("\n"):  # characters that end lines elsewhere may stand in a label
        if begun := name.match(line):
            sample = _sample(line, begun.end())
            if found.setdefault(frozenset(sample.labels.items()), sample) is not sample:
                raise ValueError(f"{metric} stands twice with the same labels")
    return list(found.values())


def _sample(line: str, at: int) -> Sample:
    """`at`: where the name ends."""
    rest = REST.fullmatch(line, at)
    if rest is None:
        raise ValueError(f"no sample: {line[:120]!r}")
    pairs = PAIR.findall(rest["pairs"] or "")
    if len({label for label, _ in pairs}) < len(pairs):
        raise ValueError(f"a label stands twice: {line[:120]!r}")
    return Sample({label: _plain(value) for label, value in pairs}, float(rest["number"]))


def _plain(value: str) -> str:
    return ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], value)
