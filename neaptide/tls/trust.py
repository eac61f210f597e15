"""TLS towards others: contexts for replicas by https, renewed as their files change, and why one was not trusted.

A context is made when it is first needed (the system's store takes some 10 ms to read) and shared by all with the same
settings.
"""

from __future__ import annotations

import logging
import ssl
from typing import NamedTuple

from neaptide.errors import ConfigError
from neaptide.tls.context import check_key, load_authorities, load_pair
from neaptide.tls.served import Settling, signature
from neaptide.tls.settings import ReplicaTls

log = logging.getLogger("neaptide.tls")

SYSTEM = ReplicaTls()
EXPIRED, NOT_YET, NAME, ADDRESS = 10, 9, 62, 64  # X509_V_ERR_*
UNKNOWN = (2, 18, 19, 20, 21, 24)
WANTS_OURS = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN",
              "CERTIFICATE_EXPIRED", "ACCESS_DENIED")  # fmt: skip


class Why(NamedTuple):
    """What a handshake failed by, as in "The replica ..."; and what its operator can do."""

    reason: str
    fix: str


class Trust:
    """All contexts of this process towards replicas."""

    def __init__(self) -> None:
        self._held: dict[ReplicaTls, tuple[ssl.SSLContext, Settling]] = {}

    def context(self, tls: ReplicaTls) -> ssl.SSLContext:
        """ConfigError E130 to E132 when its files are no good."""
        held = self._held.get(tls)
        if held is None:
            held = self._held[tls] = (towards(tls), Settling(signature(tls.paths())))
        return held[0]

    def poll(self) -> None:
        """Read again what has changed; the context before stays where that is no good."""
        for tls, (_, settling) in list(self._held.items()):
            if not settling.is_due(signature(tls.paths())):
                continue
            try:
                self._held[tls] = (towards(tls), settling)
                log.info("new connections to replicas use what is now in %s", ", ".join(tls.paths()))
            except ConfigError as e:
                log.error("TLS to replicas: %s; what was there before stays in force. %s", e.what, e.fix)


def towards(tls: ReplicaTls) -> ssl.SSLContext:
    """The context of a client with these settings."""
    context = ssl.create_default_context() if not tls.ca else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if tls.ca:
        load_authorities(context, tls.ca)
    if tls.cert:
        check_key(tls.key)
        load_pair(context, tls.cert, tls.key)
    if not tls.verify:
        log.warning("TLS to a replica with verify: false: whoever answers there is taken for it")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def why_untrusted(error: ssl.SSLError) -> Why:
    """Why a replica's handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _of_certificate(error)
    reason = getattr(error, "reason", None) or ""
    if any(word in reason for word in WANTS_OURS):
        return Why("wants a client certificate, or did not take ours", "set cert and key in its tls, and see its log")
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"):
        return Why("does not speak TLS on that port", "correct its url: the port, or http://")
    if "VERSION" in reason or "PROTOCOL" in reason or "CIPHER" in reason:
        return Why("has no version of TLS or no cipher in common with us", "it must speak TLS 1.2 or newer")
    return Why(f"broke TLS ({reason or 'no reason given'})", "see its log")


def _of_certificate(error: ssl.SSLCertVerificationError) -> Why:
    code = error.verify_code
    if code == EXPIRED:
        return Why("has a certificate that has expired", "renew it there")
    if code == NOT_YET:
        return Why("has a certificate that is not valid yet", "compare the clocks of both hosts")
    if code in (NAME, ADDRESS):
        return Why("has a certificate for another name", "set server_name in its tls to a name in the certificate")
    if code in UNKNOWN:
        return Why("has a certificate that nobody we trust has signed", "set ca in its tls to its authority's file")
    return Why(f"has a certificate that is not valid ({error.verify_message})", "renew it there")
