"""The table: a gateway that applies every delta holds what control holds."""

from __future__ import annotations

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neaptide.link import MAX_FRAME
from neaptide.table import (
    DeploymentRow,
    Fast,
    KeyRow,
    Limits,
    ReplicaRow,
    Slow,
    Table,
    apply,
    difference,
    parts,
    whole,
)

names = st.sampled_from([f"n{i}" for i in range(6)])
replicas = st.dictionaries(names, st.sampled_from(["ready", "draining"]), max_size=6).map(
    lambda d: tuple(ReplicaRow(id=i, model="m", endpoint=f"link:/{i}", state=s) for i, s in d.items())
)
keys = st.dictionaries(names, st.booleans(), max_size=6).map(
    lambda d: tuple(KeyRow(id=i, digest=i, disabled=x) for i, x in d.items())
)
deployments = st.sets(names, max_size=3).map(lambda s: tuple(DeploymentRow(model=m) for m in sorted(s)))


@st.composite
def tables(draw: st.DrawFn) -> Table:
    return Table(
        fast=Fast(version=draw(st.integers(1, 9)), replicas=draw(replicas)),
        slow=Slow(
            version=draw(st.integers(1, 9)),
            keys=draw(keys),
            deployments=draw(deployments),
            auth=draw(st.booleans()),
            limits=Limits(connections=draw(st.integers(1, 5))),
        ),
    )


def same(a: Table | None, b: Table) -> bool:
    """Equal but for the order of rows, which means nothing."""
    assert a is not None

    def canon(t: Table) -> object:
        return (
            sorted(t.fast.replicas, key=lambda r: r.id),
            sorted(t.slow.keys, key=lambda k: k.id),
            msgspec.structs.replace(t.slow, keys=()),
            t.fast.version,
        )

    return canon(a) == canon(b)


@given(tables(), tables())
def test_applying_the_difference_gives_the_new_table(old: Table, new: Table) -> None:
    delta = msgspec.json.decode(msgspec.json.encode(difference(old, new)), type=type(difference(old, new)))
    assert same(apply(old, delta), new)


@given(tables(), tables())
def test_a_whole_table_replaces_whatever_was_held(held: Table, new: Table) -> None:
    assert same(apply(held, whole(new)), new)


@given(tables(), tables())
def test_a_delta_from_another_version_is_refused(old: Table, new: Table) -> None:
    later = msgspec.structs.replace(old, fast=msgspec.structs.replace(old.fast, version=old.fast.version + 1))
    assert apply(later, difference(old, new)) is None


long_keys = st.lists(st.tuples(st.integers(0, 128), st.integers(1, 128)), max_size=40).map(
    lambda sizes: tuple(
        KeyRow(id=f"k{i}", digest="d" * 64, models=tuple(f"{m:03}" + "模" * (n - 1) for m in range(count)))
        for i, (count, n) in enumerate(sizes)
    )
)


LONGEST = KeyRow(id="k", digest="d" * 64, models=tuple(f"{m:03}" + "模" * 125 for m in range(128)))
MANY_LONG = tuple(msgspec.structs.replace(LONGEST, id=f"k{i}") for i in range(40))


@given(long_keys, st.integers(0, 3_000))
@example(MANY_LONG, 3_000)
@settings(max_examples=30)
def test_whatever_is_in_keys_each_part_fits_a_frame_and_the_parts_are_the_whole(
    keys: tuple[KeyRow, ...], others: int
) -> None:
    rows = tuple(ReplicaRow(id=f"r{i}", model="m" * 128, endpoint=f"link:/{i}", state="ready") for i in range(others))
    new = Table(fast=Fast(version=1, replicas=rows), slow=Slow(version=1, keys=keys))
    held = Table()
    for part in parts(whole(new)):
        assert len(msgspec.json.encode(part)) < MAX_FRAME
        after = apply(held, part)
        assert after is not None
        held = after
    assert same(held, new)


def test_many_keys_go_in_parts_that_each_fit_a_frame() -> None:
    many = tuple(KeyRow(id=f"k{i}", digest="d" * 64, name="n" * 60, tenant="t" * 30) for i in range(9_000))
    new = Table(fast=Fast(version=1), slow=Slow(version=1, keys=many))
    cut, held = parts(whole(new)), Table()
    assert max(len(msgspec.json.encode(p)) for p in cut) < MAX_FRAME
    for part in cut:
        after = apply(held, part)
        assert after is not None
        held = after
    assert same(held, new)
