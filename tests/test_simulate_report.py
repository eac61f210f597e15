"""The simulator's page: one file, two languages, drawings that say what was found."""

from __future__ import annotations

import json
import re
import string
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.simulate import plots, policies, texts
from neaptide.simulate.arrivals import Rates
from neaptide.simulate.compare import Comparison, Question, compare
from neaptide.simulate.outcome import Price
from neaptide.simulate.report import page, shown_row
from neaptide.simulate.svg import Axis, tag, ticks
from neaptide.simulate.world import World
from tests.cli_run import cli

ROOT = Path(__file__).parent.parent
VOID = {"meta", "br", "link", "img", "hr", "input"}
FETCHING = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")


@cache
def found(series: str = "short", slos: tuple[float, ...] = ()) -> Comparison:
    """Two hours to tune on, two to report; the own policy too where it is there."""
    rates = Rates(series=series, window_s=600, start_s=79200.0, rates=6 * (1 + 0.4 * np.sin(np.arange(24) / 3)))
    names = (policies.OWN, "hpa", "hpa-tuned", "static", "static-tuned", "dynamo")
    asked = Question(policies=names, first_day=1, last_day=1, tune=(0, 0), slos=slos)
    return compare(World(tick_s=10, service_s=10, replicas_at_peak=12), rates, asked)


class Tree(HTMLParser):
    """Checks that elements nest, and keeps what a reader would look for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.classes: list[str] = []
        self.words: dict[str, str] = {"en": "", "zh-CN": ""}
        self._lang: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fetched += [f"{tag} {name}" for name in FETCHING if name in given]
        self.classes.append(given.get("class") or "")
        if tag not in VOID:
            self.open.append(tag)
            self._lang.append(given.get("lang"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        self._lang.pop()

    def handle_data(self, data: str) -> None:
        spoken = next((lang for lang in reversed(self._lang) if lang), None)
        if spoken and len(self._lang) > 1:
            self.words[spoken] += data


def read(text: str) -> Tree:
    tree = Tree()
    tree.feed(text)
    tree.close()
    assert tree.open == []
    return tree


def test_the_page_is_well_formed_and_fetches_nothing() -> None:
    text = page(found(), Price(12.0))
    tree = read(text)
    assert tree.fetched == []
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize(("language", "lang"), [("en", "en"), ("zh", "zh-CN")])
def test_both_languages_stand_in_the_page_and_one_is_shown(language: str, lang: str) -> None:
    text = page(found(), language=language)
    assert f'<html lang="{lang}">' in text
    words = read(text).words
    assert "Cost against attainment" in words["en"]
    assert "费用与达标率" in words["zh-CN"]
    assert not re.search(r"[一-鿿]", words["en"].replace("中文", ""))


def test_the_bounds_definition_stands_beside_the_ratios() -> None:
    words = read(page(found())).words
    assert words["en"].count("over the bound's") >= 3  # above the drawings, under the first, under the table
    assert "clairvoyant schedule of the same fluid world" in words["en"]
    assert "预知未来的排班" in words["zh-CN"]


def test_every_point_is_drawn_or_counted_as_outside() -> None:
    comparison = found()
    drawing, outside = plots.cost_against_attainment(comparison)
    assert drawing.count('class="dot"') + outside == len(comparison.points)
    assert f"{outside} points lie outside" in page(comparison) or not outside
    assert 'class="front"' in drawing
    assert 'class="goal"' in drawing


def test_shipped_and_chosen_targets_are_marked() -> None:
    drawing, _ = plots.cost_against_attainment(found())
    for name, mark in (("hpa", "as-shipped"), ("hpa-tuned", "tuned")):
        assert re.search(rf"<title>{name} · [^<]*</title></(rect|circle)>", drawing)
        assert f'class="{mark}"' in drawing


dots = st.lists(st.tuples(st.floats(0, 1), st.floats(0.5, 5)), max_size=40)


@given(dots)
def test_the_front_is_what_nothing_else_beats(points: list[tuple[float, float]]) -> None:
    kept = plots.front(points)
    assert set(kept) <= set(points)
    for miss, cost in points:
        assert any(m <= miss and c <= cost for m, c in kept)
    for one in kept:
        assert not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in kept)


def test_replicas_and_need_are_drawn_over_the_reported_days_only() -> None:
    comparison = found()
    drawing = plots.replicas_against_need(comparison, shown_row(comparison))
    xs = [float(x) for x in re.findall(r"H([\d.]+)", drawing)]
    assert min(xs) > plots.LEFT
    assert max(xs) == pytest.approx(plots.WIDTH - plots.RIGHT)
    assert len(xs) == 2 * 24  # two lines, two hours in stretches of five minutes
    assert "day 1" in drawing
    assert "day 0" not in drawing


def test_a_static_count_is_a_level_line() -> None:
    comparison = found()
    (row,) = [row for row in comparison.rows if row.name == "static"]
    line = re.search(r'<path d="([^"]+)" fill="none" class="paid"', plots.replicas_against_need(comparison, row))
    assert line is not None
    assert "V" not in line[1]


def test_the_price_of_the_slo_is_told_where_the_own_policy_ran() -> None:
    comparison = found(slos=(0.9, 0.99, 0.999))
    text = page(comparison, Price(12.0))
    assert [p.target for p in comparison.slo_points] == [0.9, 0.99, 0.999]
    assert re.search(r"99 % → 99\.9 %: [+-]¥[\d,.]+ a day", text)
    assert "replica-hours a day" in page(comparison)
    assert "The price of the SLO" not in page(found())


def test_what_misses_the_goal_is_told_in_words() -> None:
    comparison = found()
    missing = sum(not comparison.reached(row.reported) for row in comparison.rows)
    assert missing
    assert read(page(comparison)).words["en"].count("misses the goal") == missing


def test_names_from_a_file_are_text_not_markup() -> None:
    text = page(found(series='<script>alert("x")</script>'))
    assert "<script>alert" not in text
    read(text)


def test_every_text_of_the_page_exists_in_both_languages_and_is_used() -> None:
    speaking = ("report.py", "plots.py", "report.html", "sheet.html")
    spoken = "".join((ROOT / "neaptide" / "simulate" / name).read_text("utf-8") for name in speaking)
    for key, words in texts.catalogue().items():
        assert set(words) == set(texts.LANGUAGES), key
        fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in words.values()]
        assert key == "bound.long" or fields[0] == fields[1], key  # the definition itself is English
        assert f'"{key}"' in spoken or key.startswith(("col.", "world.")), key


# --------------------------------------------------------------------------------------------- drawing


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_ticks_are_round_within_the_span_and_not_too_many(low: float, span: float, wanted: int) -> None:
    found = ticks(low, low + span, wanted)
    assert len(found) <= wanted + 1
    assert all(low - span * 1e-3 <= value <= low + span * 1.001 for value in found)


def test_an_axis_maps_its_ends_and_holds_what_is_within() -> None:
    axis = Axis(0.3, 0.0001, 10.0, 110.0, np.log10)
    assert (axis(0.3), axis(0.0001)) == pytest.approx((10.0, 110.0))
    assert axis(5.0) == 10.0
    assert axis.holds(0.01)
    assert not axis.holds(0.5)


def test_attributes_are_escaped() -> None:
    assert tag("a", class_='"x"', stroke_width=2.0) == '<a class="&quot;x&quot;" stroke-width="2"/>'


# --------------------------------------------------------------------------------------------- the command


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    made = "synthetic:steady,days=0.05,mean_rps=0.2"
    file = tmp_path / "report.html"
    done = cli("simulate", "--arrivals", made, "--policy", "hpa", "--html", str(file), "--json", "--lang", "zh")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policies"]
    assert '<html lang="zh-CN">' in file.read_text("utf-8")
    read(file.read_text("utf-8"))


def test_a_page_that_cannot_be_written_is_an_error_that_says_where(tmp_path: Path) -> None:
    where = tmp_path / "none" / "report.html"
    done = cli(
        "simulate", "--arrivals", "synthetic:steady,days=0.05,mean_rps=0.2", "--policy", "static", "--html", str(where)
    )
    assert done.returncode == 2
    assert str(where) in done.stderr


def test_the_rendered_example_is_current_and_small() -> None:
    text = (ROOT / "docs" / "simulate-example.html").read_text("utf-8")
    assert len(text.encode()) < 300_000
    pages = ROOT / "neaptide" / "simulate"
    shared = re.search(r"<style>(.*?)\{%", (pages / "sheet.html").read_text("utf-8"), re.S)
    own = re.search(r"block style %\}(.*?)\{\{", (pages / "report.html").read_text("utf-8"), re.S)
    assert shared is not None
    assert own is not None
    assert shared[1] + own[1] in text
    assert read(text).fetched == []
