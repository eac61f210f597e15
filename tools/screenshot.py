"""Makes the pictures of the live page in docs/ from a real run: an echo model under a tide of requests, with rules.

    python -m tools.screenshot [--seconds 200] [--out docs]

It starts a service of its own in a temporary directory, sends requests whose rate rises and falls, then opens the page
in the system's chromium and keeps what it shows. Needs chromium and `pip install neaptide[dev]`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.browser import chromium

CONFIG = """
models:
  chat:
    engine: echo
    options: {echo_ttft_ms: 120, echo_tpot_ms: 14, max_running: 4}
    slo: {ttft_s: 0.6}
    scale:
      min: 1
      max: 4
      policy: thresholds
      price_per_hour: 3.2
      rules:
        - {signal: in_flight, per_replica: true, above: 3.4, for_s: 3, add: 1, cooldown_s: 8}
        - {signal: in_flight, per_replica: true, below: 1.6, for_s: 12, add: -1, cooldown_s: 15}
"""
PROMPT = "The tide lifts every boat that floats."  # echoed: about 40 tokens
LEAST, MOST, TIDE_S = 2.0, 12.0, 150.0  # requests/s, and seconds from ebb to ebb


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the pictures of the live page.")
    parser.add_argument("--seconds", type=float, default=200.0, help="of traffic before the pictures")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        (Path(folder) / "neaptide.yaml").write_text(CONFIG, encoding="utf-8")
        command = (
            "up",
            "-d",
            "-f",
            str(Path(folder) / "neaptide.yaml"),
            "--state",
            str(state),
            "--port",
            "0",
            "--json",
        )
        up = json.loads(neaptide(*command))
        try:
            threading.Thread(target=tide, args=(up,), daemon=True).start()
            time.sleep(asked.seconds)
            pictures(str(json.loads(neaptide("dashboard", "--state", str(state), "--json"))["url"]), asked.out)
        finally:
            neaptide("down", "--state", str(state), "--grace-s", "5")
    return 0


def neaptide(*args: str) -> str:
    command = [sys.executable, "-m", "neaptide.cli", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def tide(up: dict[str, Any]) -> None:
    """Requests at a rate that rises and falls, each on a thread of its own, their gaps drawn at random; for ever."""
    began, chance = time.monotonic(), random.Random(1)
    while True:
        now = time.monotonic() - began
        rate = LEAST + (MOST - LEAST) * (1 - math.cos(2 * math.pi * now / TIDE_S)) / 2
        threading.Thread(target=ask, args=(up,), daemon=True).start()
        time.sleep(chance.expovariate(rate))


def ask(up: dict[str, Any]) -> None:
    url = urlsplit(up["api"])
    body = {"model": "chat", "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    headers = {"Authorization": f"Bearer {up['key']}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
    try:
        connection.request("POST", f"{url.path}/chat/completions", json.dumps(body), headers)
        connection.getresponse().read()
    except OSError:
        return  # the run is over
    finally:
        connection.close()


def pictures(link: str, out: Path) -> None:
    """dashboard.png: the overview; dashboard-decisions.png: capacity, with the last decision that changed something."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light", locale="en-US")
        page.goto(link)
        page.wait_for_selector(".tile:has-text('TTFT p95')")
        page.wait_for_timeout(2500)
        page.screenshot(path=out / "dashboard.png", full_page=True)
        page.goto(page.url.partition("#")[0] + "#capacity")
        page.locator(".decision.launch").first.click()
        page.mouse.move(0, 0)
        page.wait_for_timeout(1500)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=out / "dashboard-decisions.png", full_page=True)


if __name__ == "__main__":
    sys.exit(main())
