"""A whole service in TLS: its own verbs reach it, and a certificate is renewed under it."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neaptide.clock import mono_s
from tests.conftest import ECHO, Service, neaptide
from tests.tls_kit import House, environment

RENEWED_S = 30.0  # files are looked at every 2 s; the rest is for a busy machine


def certificates(service: Service) -> dict[str, float]:
    """When each listener's expires."""
    rows = json.loads(service.run("status", "--json").stdout)["certificates"]
    return {row["listener"]: row["not_after_wall_s"] for row in rows}


def test_a_service_in_tls_answers_its_own_verbs_and_takes_up_a_new_certificate(
    serve: Callable[..., Service], tmp_path: Path
) -> None:
    # Given listeners in TLS, the admin's for clients with a certificate alone,
    house = House(tmp_path / "ca", days_ago=1)
    here: dict[str, Any] = {"dns": ("localhost", "gate.internal"), "ips": ("127.0.0.1",), "server": True}
    mine, me = house.issue("gateway", days_ago=1, **here), house.issue("me", client=True)
    pair = f"cert: {mine.cert}, key: {mine.key}"
    tls = f"tls: {{{pair}}}\nadmin: {{tls: {{{pair}, client_ca: {house.ca}, client_auth: required}}}}\n"
    service = serve(ECHO + tls)
    assert (service.api[:8], service.admin[:8]) == ("https://", "https://")
    # when it is asked by the verbs of its host,
    assert service.run("chat", "hello", "--max-tokens", "4").stdout.strip()
    assert service.run("status", check=False).returncode == 3
    by_name = urllib.request.Request(service.admin + "health", headers={"Host": "gate.internal:8001"})
    assert urllib.request.urlopen(by_name, context=house.client(me), timeout=10).status == 200
    with environment(NEAPTIDE_CLIENT_CERT=me.cert, NEAPTIDE_CLIENT_KEY=me.key):
        before = certificates(service)
        assert set(before) == {"admin", "gateway-0"}
        assert service.run("dashboard").stdout.startswith("https://")
        # and the pair is renewed, then both listeners take it up, and nothing was restarted.
        house.issue("gateway", renew=True)
        end_s = mono_s() + RENEWED_S
        while not all(until > before[name] for name, until in certificates(service).items()):
            assert mono_s() < end_s
    assert "listen: new connections get the certificate CN=gateway" in (service.state / "log/gateway-0.log").read_text()
    page = urllib.request.urlopen(service.api.removesuffix("/v1") + "/metrics", context=house.client(), timeout=10)
    (left,) = re.findall(r"^neaptide_tls_certificate_days_left (\S+)$", page.read().decode(), re.M)
    assert 89.9 < float(left) <= 90
    said = "".join(path.read_text(errors="replace") for path in (service.state / "log").glob("*"))
    assert "PRIVATE" not in said


def test_a_pair_that_does_not_fit_keeps_the_service_from_starting(tmp_path: Path) -> None:
    house = House(tmp_path / "ca")
    one, other = house.issue("one"), house.issue("other")
    config = tmp_path / "n.yaml"
    config.write_text(f"{ECHO}tls: {{cert: {one.cert}, key: {other.key}}}\n")
    done = neaptide("up", "-d", "-f", str(config), "--state", str(tmp_path / "s"), "--port", "0", check=False)
    assert done.returncode == 2
    assert "error[E131]" in done.stderr
    assert not (tmp_path / "s" / "run" / "up.json").exists()
