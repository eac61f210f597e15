"""What an operator says of replicas that somebody else runs: which revision, what share of traffic, inside or outside.
Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from neaptide.errors import ConfigError

REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,159}")
PERCENT = 100


def is_outside(url: str) -> bool:
    """Whether what is sent there leaves the house, as far as the URL tells: all but this host does. A private address
    may be anybody's: who knows that it is not says so."""
    host = ""
    try:
        host = urlsplit(url).hostname or ""
        return not ip_address(host).is_loopback
    except ValueError:  # a name, or nothing that a request could be sent to
        return host != "localhost"


def check_traffic(key: str, traffic: Mapping[str, int], revisions: Sequence[str]) -> None:
    """`revisions`: one a replica. ConfigError E108 where shares and replicas do not fit together."""
    for i, name in enumerate(revisions):
        if name and not REVISION.fullmatch(name):
            what = f"{key}.replicas[{i}].revision: {name!r}"
            raise ConfigError(what, code="E108", fix="letters, digits and . _ : / -, at most 160")
    if not traffic:
        return
    if not revisions:
        why = "its own replicas run one revision, but for the time in which a new one replaces the old"
        raise ConfigError(f"{key}.traffic without replicas", why=why, code="E108", fix=f"remove {key}.traffic")
    if "" in revisions:
        what = f"{key}.replicas[{revisions.index('')}] has no revision, and {key}.traffic shares by it"
        raise ConfigError(what, code="E108", fix="name the revision of each replica")
    unknown = [name for name in traffic if name not in revisions]
    if unknown:
        what = f"{key}.traffic: no replica is of the revision {unknown[0]!r}"
        raise ConfigError(what, code="E108", fix=f"the replicas are of {', '.join(dict.fromkeys(revisions))}")
    if min(traffic.values()) < 0 or sum(traffic.values()) != PERCENT:
        what = f"{key}.traffic: {', '.join(map(str, traffic.values()))}"
        raise ConfigError(what, code="E108", fix="whole percents from 0 that sum to 100, such as 90 and 10")
