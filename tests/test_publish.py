"""Control's side of the table: a gateway that follows it holds it, whatever it held before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from neaptide.control.publish import Gateway, Publisher
from neaptide.link import FETCH, GAUGES, HELLO, TABLE, FrameReader, Hello, frame
from neaptide.table import Delta, DeploymentRow, Fast, Gauges, KeyRow, ReplicaRow, Slow, Table, apply

TOKEN = "boot"


class Follower:
    """The least a gateway does."""

    def __init__(self) -> None:
        self.table, self.frames = Table(), FrameReader()

    async def connect(self, path: Path, token: str = TOKEN) -> None:
        self.reader, self.writer = await asyncio.open_unix_connection(str(path))
        hello = Hello(token=token, role="gateway", name="gateway-0", epoch=7, pid=1)
        self.writer.write(frame(0, HELLO, msgspec.json.encode(hello)))
        self.writer.write(frame(0, FETCH, b'{"fast":0,"slow":0}'))

    async def follow(self) -> None:
        """Until the next table."""
        while True:
            data = await asyncio.wait_for(self.reader.read(1 << 16), 5)
            if not data:
                raise ConnectionError("control hung up")
            tables = [f for f in self.frames.feed(data) if f.type == TABLE]
            for item in tables:
                after = apply(self.table, msgspec.json.decode(item.payload, type=Delta))
                assert after is not None, "a delta from a version we do not hold"
                self.table = after
            if tables:
                return

    def tell(self) -> None:
        gauges = Gauges(
            gateway="gateway-0", mono_s=1.0, fast=self.table.fast.version, slow=self.table.slow.version, connections=3
        )
        self.writer.write(frame(0, GAUGES, msgspec.json.encode(gauges)))


def row(id: str, state: str = "ready") -> ReplicaRow:
    return ReplicaRow(id=id, model="m", endpoint=f"link:/{id}", state=state)


def test_a_gateway_gets_the_whole_table_then_only_what_changes(tmp_path: Path) -> None:
    async def story() -> None:
        heard: list[Gateway] = []
        publisher = Publisher(TOKEN, heard.append)
        await publisher.listen(tmp_path / "c.sock")
        slow = Slow(deployments=(DeploymentRow(model="m"),), keys=(KeyRow(id="k", digest="d"),))
        assert publisher.replace(Fast(replicas=(row("m-0"),)), slow)
        follower = Follower()
        await follower.connect(tmp_path / "c.sock")
        await follower.follow()
        assert follower.table == publisher.table
        assert not publisher.in_force()
        follower.tell()
        async with asyncio.timeout(5):
            while not heard:
                await asyncio.sleep(0.01)
        assert publisher.in_force()
        assert heard[0].gauges is not None
        assert heard[0].gauges.connections == 3

        slow_before = follower.table.slow.version
        publisher.replace(Fast(replicas=(row("m-0", "draining"), row("m-1"))), slow)
        await follower.follow()
        assert follower.table == publisher.table
        assert follower.table.slow.version == slow_before
        assert not publisher.in_force()
        follower.writer.close()
        await publisher.close()

    asyncio.run(story())


def test_putting_the_same_table_in_force_again_changes_no_version() -> None:
    publisher = Publisher(TOKEN, lambda g: None)
    assert publisher.replace(Fast(replicas=(row("m-0"),)), Slow())
    before = publisher.table
    assert not publisher.replace(Fast(replicas=(row("m-0"),)), Slow())
    assert publisher.table is before


def test_a_peer_without_the_boot_token_learns_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        publisher = Publisher(TOKEN, lambda g: None)
        await publisher.listen(tmp_path / "c.sock")
        publisher.replace(Fast(), Slow(keys=(KeyRow(id="k", digest="d"),)))
        stranger = Follower()
        await stranger.connect(tmp_path / "c.sock", token="guess")
        with pytest.raises(ConnectionError):
            await stranger.follow()
        assert not publisher.gateways
        stranger.writer.close()
        await publisher.close()

    asyncio.run(story())


def test_the_control_socket_is_for_this_user_alone(tmp_path: Path) -> None:
    async def story() -> None:
        publisher = Publisher(TOKEN, lambda g: None)
        await publisher.listen(tmp_path / "c.sock")
        assert (tmp_path / "c.sock").stat().st_mode & 0o777 == 0o600
        await publisher.close()

    asyncio.run(story())
