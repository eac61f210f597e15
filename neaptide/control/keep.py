"""What control keeps in the state directory, so that its successor goes on: the lock, what was learnt, overrides.

scaling.json is written each minute and at a clean end: the policies' memory and the learnt traits, and what the shadows
cost. A file of another version, from a later time or damaged is set aside with a line in the log, never fatal. What
looks back over minutes is of no use when it is older than that: such a policy starts anew.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from neaptide.control.memory import Memory, fits, pack
from neaptide.control.policy import State
from neaptide.control.shadow import Days
from neaptide.control.traits import Memory as Learnt
from neaptide.fleet.state import write_private
from neaptide.types import Override

log = logging.getLogger("neaptide.control")
VERSION = 1
EVERY_S = 60.0
OLD_S = 600.0  # the longest window of the peers' policies
FUTURE_S = 60.0
LOCK_S = 0.1  # between two tries


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    version: int = VERSION
    wall_s: float = 0.0
    policies: dict[str, bytes] = {}
    learnt: Learnt = Learnt()
    shadows: Days = Days()


class Wants(NamedTuple):
    """Whose memory a model can go on with: the policy's name and what it begins with."""

    policy: str
    start: State


class Version(msgspec.Struct):
    version: int = 0


def save(path: Path, kept: Kept) -> None:
    """Atomically, 0600, durable."""
    write_private(path, msgspec.json.encode(kept).decode())


def load(path: Path, now_wall_s: float, policies: Mapping[str, Wants]) -> Kept:
    """What was kept, made fit to go on with; `policies`: whose memory each model wants. An empty Kept for none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return Kept()
    try:
        version = msgspec.json.decode(raw, type=Version).version
        if version != VERSION:
            return _aside(path, f"it has version {version}, this is {VERSION}")
        kept = msgspec.json.decode(raw, type=Kept)
    except (OSError, ValueError) as e:
        return _aside(path, str(e))
    if kept.wall_s > now_wall_s + FUTURE_S:
        return _aside(path, f"it is from {kept.wall_s - now_wall_s:.0f} s in the future: the clock was set back")
    fresh = {m: p for m, raw in kept.policies.items() if (p := _resumed(m, raw, policies, now_wall_s - kept.wall_s))}
    return msgspec.structs.replace(kept, policies=fresh)


def _resumed(model: str, raw: bytes, policies: Mapping[str, Wants], age_s: float) -> bytes | None:
    """The memory with its last count forgotten: what runs now is what counts."""
    wanted, start = policies.get(model, Wants("none", {}))
    try:
        memory = msgspec.msgpack.decode(raw, type=Memory)
    except msgspec.MsgspecError as e:
        log.warning("%s: what its policy remembered is set aside: %s", model, e)
        return None
    if memory.policy != wanted:
        log.info("%s: what the policy %s remembered is set aside, %s decides now", model, memory.policy, wanted)
        return None
    if not fits(memory, start):
        log.warning("%s: what the policy %s remembered is set aside: it has another shape", model, wanted)
        return None
    if age_s > OLD_S and wanted != "slo":
        log.warning("%s: what the policy %s remembered is %.0f s old and starts anew", model, wanted, age_s)
        return None
    return pack(msgspec.structs.replace(memory, next_s=-math.inf, wanted=None))


def _aside(path: Path, why: str) -> Kept:
    place = path.with_suffix(".json.aside")
    path.replace(place)
    log.warning("%s is set aside as %s: %s", path, place.name, why)
    return Kept()


# --- overrides --------------------------------------------------------------------------------------------------------


def read_overrides(path: Path, now_wall_s: float) -> dict[str, Override]:
    """Those that still hold. A damaged file is set aside."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Override])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        _aside(path, str(e))
        return {}
    return {m: o for m, o in found.items() if o.until_wall_s > now_wall_s}


def write_overrides(path: Path, overrides: Mapping[str, Override]) -> None:
    write_private(path, msgspec.json.encode(dict(overrides)).decode())


# --- one control at a time --------------------------------------------------------------------------------------------


async def hold(path: Path, ending: asyncio.Event) -> int | None:
    """The lock's descriptor, once no other control holds it; None when told to end meanwhile. It is held until the
    process ends, however it ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    told = False
    while not ending.is_set():
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                log.warning("another control (pid %s) acts here; waiting for its end", holder or "not known")
                told = True
            await asyncio.sleep(LOCK_S)
            continue
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd
    os.close(fd)
    return None
