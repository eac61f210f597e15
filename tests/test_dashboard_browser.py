"""The live page in a real browser, over a real service: drawn, in both languages, without another host."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from neaptide.clock import wall_s
from neaptide.control.port import NewOverride
from neaptide.types import Choice, Override, Plan
from tests.browser import CHROMIUM, Watch, chromium
from tests.conftest import Service, serving
from tests.dashboard_kit import BEARER, Site, look, site
from tests.traffic import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="SKIPPED LOUDLY: no chromium here, the live page was not drawn"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None,
        reason="SKIPPED LOUDLY: playwright is not installed (pip install neaptide[dev]), the live page was not drawn",
    ),
]
CONFIG = """
models:
  echo:
    engine: echo
    options: {echo_ttft_ms: 30, echo_tpot_ms: 3, max_running: 8}
    scale: {min: 1, max: 1, price_per_hour: 3.2}
    max_tokens_default: 4000
"""
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("dashboard"), CONFIG) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    yield opened
    context.close()


def link(service: Service) -> str:
    return str(json.loads(service.run("dashboard", "--json").stdout)["url"])


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Site]:
    """The page over a control of plain memory, whose model has room to scale and whose clock is right."""
    with site(tmp_path) as here:
        here.second = int(wall_s()) - 1_760_000_000
        yield here


def beat(kit: Site, override: Override | None = None) -> None:
    kit.second += 1
    kit.beat(look(kit.second, model="guide", override=override))


def opened(page: Page, kit: Site, by: str = "ann") -> Watch:
    """The capacity picture, by a link that `by` asked for."""
    told = json.loads(kit.ask("POST", "/ui/ticket", BEARER, json.dumps({"by": by}).encode())[2])
    watch = Watch(page)
    page.goto(f"{told['url']}#capacity")
    page.wait_for_selector(".hand form")
    return watch


def signed_in(page: Page, service: Service, path: str = "") -> Watch:
    watch = Watch(page)
    page.goto(link(service) + path)
    page.wait_for_selector(".link.live")
    return watch


def flawless(watch: Watch, service: Service) -> None:
    assert watch.complaints == []
    assert watch.hosts == {urlsplit(service.admin).netloc}


def test_the_page_shows_numbers_in_both_languages_and_asks_no_other_host(page: Page, service: Service) -> None:
    watch = signed_in(page, service)
    page.wait_for_selector(".tile:has-text('Cost an hour') strong:has-text('¥3.20')")
    assert page.locator(".uplot").count() == 3
    assert "ticket" not in page.url
    page.get_by_role("button", name="24 h").click()
    page.get_by_role("button", name="echo", exact=True).click()  # the model's own numbers
    page.get_by_role("button", name="15 min").click()
    assert page.locator(".scope select").input_value() == "echo"
    page.get_by_role("button", name="中文").click()
    page.wait_for_selector("text=每小时费用")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.reload()
    page.wait_for_selector("text=每小时费用")  # the choice stays
    flawless(watch, service)


def test_dark_and_light_are_a_click_apart(page: Page, service: Service) -> None:
    watch = signed_in(page, service)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.wait_for_selector(".uplot")
    flawless(watch, service)


def test_a_decisions_flag_tells_its_sentence_when_clicked(page: Page, service: Service) -> None:
    watch = signed_in(page, service, "#capacity")
    flag = page.locator(".flag.launch").first
    told = flag.get_attribute("title") or ""
    flag.click(force=True)  # a hold's flag may stand over it
    words = page.locator(".words p").first.text_content() or ""
    assert "echo" in words
    assert words in told
    flawless(watch, service)


def test_a_decision_is_reached_by_keyboard(page: Page, service: Service) -> None:
    signed_in(page, service, "#capacity")
    line = page.locator(".decision").first
    line.focus()
    page.keyboard.press("Enter")
    assert (line.locator("span").text_content() or "-") in (page.locator(".words").text_content() or "")


def test_the_charts_move_on_with_each_second(page: Page, kit: Site) -> None:
    choice = Choice(model="guide", action="hold", before=1, after=1, sentence="guide: 1 stays")
    kit.beat(look(kit.second, model="guide", plan=Plan(choices=(choice,))))
    beat(kit)
    opened(page, kit)
    place = page.locator(".flag").first
    before = place.evaluate("flag => flag.style.left")
    for _ in range(5):
        beat(kit)
    wait_for(lambda: place.evaluate("flag => flag.style.left") != before, "the flag has moved with its time")


def test_a_count_is_set_and_cleared_by_hand_with_the_keyboard(page: Page, kit: Site) -> None:
    beat(kit)
    watch = opened(page, kit)
    assert "slo decides" in (page.text_content(".hand") or "")
    page.get_by_label("Replicas (1 to 2)").focus()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("2")
    page.locator(".hand select").select_option("7200")
    page.get_by_label("Replicas (1 to 2)").press("Enter")
    wait_for(lambda: kit.control.override, "control was told")
    assert kit.control.asked[-1] == NewOverride(model="guide", replicas=2, for_s=7200, by="ann")
    until_s = 1_760_000_000.0 + kit.second + 7201
    beat(kit, Override(count=2, until_wall_s=until_s, by="ann"))
    page.wait_for_selector(".hand:has-text('2 replicas until')")
    said = page.text_content(".hand header") or ""
    assert said.endswith("2 hr left, set by ann")
    beat(kit, Override(count=2, until_wall_s=until_s, by="ann"))
    page.wait_for_selector(".hand:has-text('1 hr 59 min left')")  # counted down by control's clock
    page.get_by_role("button", name="Let the policy decide").press("Enter")
    wait_for(lambda: kit.control.override is None, "control was told")
    assert kit.control.asked[-1] == ("clear", "guide")
    beat(kit)
    page.wait_for_selector(".hand:has-text('slo decides')")
    assert watch.complaints == []


def test_a_count_that_control_refuses_says_why(page: Page, kit: Site) -> None:
    kit.beat(look(1, model="somebody-elses"))
    opened(page, kit)
    page.get_by_role("button", name="Set", exact=True).click()
    page.wait_for_selector("[role=alert]:has-text(\"no model 'somebody-elses' is served\")")


def test_what_other_policies_would_have_cost_is_a_table_with_sentences_in_both_languages(page: Page, kit: Site) -> None:
    beat(kit)
    page.set_viewport_size({"width": 380, "height": 800})
    watch = opened(page, kit)
    page.wait_for_selector("text=hpa would have cost ¥41.00 more on May 1, 2026 and missed 3.0 %")
    rows = page.locator(".shadows tbody tr").all_text_contents()
    assert len(rows) == 2
    assert "slo ran and cost ¥32.00" in rows[0]
    assert "+¥41.00" in rows[1]
    assert "97.0 %" in rows[1]
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    page.get_by_role("button", name="中文").click()
    page.wait_for_selector("text=2026年5月1日若用 hpa，会多花 ¥41.00，3.0 % 的请求超时")
    assert watch.complaints == []


def test_the_playground_answers_with_a_waterfall(page: Page, service: Service) -> None:
    watch = signed_in(page, service, "#playground")
    page.get_by_role("textbox", name="Your message").fill("high tide")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer:has-text('high tide')")
    page.wait_for_selector(".numbers:has-text('echo-0')")  # the ledger's row has come
    assert page.locator(".waterfall .token").get_attribute("d")
    page.goto(page.url.replace("#playground", "#overview"))
    page.wait_for_selector(".tile:has-text('TTFT p95')")
    flawless(watch, service)


def test_an_answer_can_be_stopped(page: Page, service: Service) -> None:
    signed_in(page, service, "#playground")
    page.get_by_role("textbox", name="Your message").fill("a long answer " * 300)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(".answer:has-text('(stopped)')")


def test_a_hidden_page_is_told_nothing_and_catches_up(page: Page, service: Service) -> None:
    signed_in(page, service)
    show = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    show += "document.dispatchEvent(new Event('visibilitychange'))"
    page.evaluate(show % "true")
    page.wait_for_selector(".link.paused")
    page.evaluate(show % "false")
    page.wait_for_selector(".link.live")


def test_a_small_screen_shows_it_without_scrolling_sideways(page: Page, service: Service) -> None:
    page.set_viewport_size({"width": 380, "height": 800})
    watch = signed_in(page, service)
    page.wait_for_selector(".tile")
    for picture in ("overview", "capacity", "playground"):
        page.evaluate(f"location.hash = '{picture}'")
        page.wait_for_selector(f"nav a[aria-current][href='#{picture}']")
        assert page.evaluate("document.documentElement.scrollWidth") <= 380, picture
    flawless(watch, service)


def test_without_a_session_the_page_says_how_to_get_one(page: Page, service: Service) -> None:
    page.goto(service.admin)
    assert "neaptide dashboard" in (page.text_content("main") or "")
    page.goto(link(service))
    page.wait_for_selector(".link.live")
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_selector("text=neaptide dashboard")


def test_the_command_prints_a_link(service: Service, tmp_path: Path) -> None:
    told = service.run("dashboard")
    assert told.stdout.startswith(f"{service.admin}?ticket=")
    assert "10 minutes" in told.stderr
