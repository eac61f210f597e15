"""The weight store: a model goes in by content, comes to a node once, is shared there, leaves when nobody uses it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from neaptide.config import parse
from neaptide.errors import ConfigError, ModelError
from neaptide.models.blobs import File
from neaptide.models.cache import Cache
from neaptide.models.hold import hold, release
from neaptide.models.sources import GUIDE, resolve
from neaptide.models.store import DirectoryStore, HttpStore, Manifest, Ref, Store, push
from tests.cli_run import cli
from tests.conftest import Service
from tests.replica_process import ReplicaProcess
from tests.test_models_sources import model_directory, quiet
from tests.traffic import chat

BIN = "openvino_model.bin"
GIB = 1 << 30


def untold(done: int, total: int) -> None:
    return None


class Watched:
    """A store that counts what is read of it, and may end early or be away."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.reads: list[tuple[str, int]] = []  # (file, offset)
        self.most_bytes: int | None = None
        self.away = False

    def latest(self, name: str) -> str:
        self._ask()
        return self.inner.latest(name)

    def manifest(self, ref: Ref) -> bytes:
        self._ask()
        return self.inner.manifest(ref)

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        self._ask()
        self.reads.append((file.name, offset))
        content = b"".join(self.inner.read(file, offset))
        yield content if self.most_bytes is None else content[: self.most_bytes]

    def _ask(self) -> None:
        if self.away:
            raise ModelError("the store is away", code="E231")


@pytest.fixture
def store(tmp_path: Path) -> Watched:
    inner = DirectoryStore(tmp_path / "store")
    push(model_directory(tmp_path / "one"), "one", inner, untold)
    other = model_directory(tmp_path / "two", {"bos_token_id": 3})  # other words in one file, the same weights
    push(other, "two", inner, untold)
    return Watched(inner)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", GIB)


def pull(cache: Cache, store: Store, name: str, digest: str = "", *, verify: bool = False) -> Path:
    return cache.pull(store, Ref(name, digest), quiet, untold, verify=verify)


def fails(code: str, call: Callable[[], object]) -> ModelError:
    with pytest.raises(ModelError) as error:
        call()
    assert error.value.code == code, error.value
    assert error.value.fix or code == "E231"
    return error.value


def content(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir()}


# ------------------------------------------------------------------------------------------------ in and out


def test_a_model_that_was_pushed_is_pulled_file_by_file_the_same(tmp_path: Path, store: Watched, cache: Cache) -> None:
    assert content(pull(cache, store, "one")) == content(tmp_path / "one")
    assert content(pull(cache, store, "two")) == content(tmp_path / "two")


def test_files_that_two_models_share_are_stored_fetched_and_kept_once(store: Watched, cache: Cache) -> None:
    one, two = pull(cache, store, "one"), pull(cache, store, "two")
    assert os.path.samefile(one / BIN, two / BIN)
    assert not os.path.samefile(one / "config.json", two / "config.json")
    assert [name for name, _ in store.reads].count(BIN) == 1
    weights = hashlib.sha256((one / BIN).read_bytes()).hexdigest()
    assert os.path.samefile(one / BIN, cache.root / "blobs" / weights[:2] / weights)
    assert cache.used_bytes() < 2 * (one / BIN).stat().st_size
    assert not os.access(one / BIN, os.W_OK) or os.geteuid() == 0
    assert (one / BIN).stat().st_mode & 0o222 == 0


def test_pushing_again_adds_nothing_and_a_changed_file_makes_another_digest(tmp_path: Path, store: Watched) -> None:
    inner = DirectoryStore(tmp_path / "store")
    first = inner.latest("one")
    again = push(tmp_path / "one", "one", inner, untold)
    assert (again.ref.digest, again.new_bytes) == (first, 0)
    (tmp_path / "one" / "tokenizer.json").write_text('{"a": 1}')
    changed = push(tmp_path / "one", "one", inner, untold)
    assert changed.new_bytes == len('{"a": 1}')
    assert inner.latest("one") == changed.ref.digest != first
    assert len([r for r in inner.refs() if r.name == "one"]) == 2


def test_a_pinned_digest_stays_what_it_was_and_a_bare_name_follows_the_last_push(
    tmp_path: Path, store: Watched, cache: Cache
) -> None:
    old = store.latest("one")
    (tmp_path / "one" / "tokenizer.json").write_text('{"a": 1}')
    push(tmp_path / "one", "one", DirectoryStore(tmp_path / "store"), untold)
    assert (pull(cache, store, "one") / "tokenizer.json").read_text() == '{"a": 1}'
    assert (pull(cache, store, "one", old) / "tokenizer.json").read_text() == "{}"


def test_progress_is_told_in_bytes_up_to_the_end(tmp_path: Path, store: Watched, cache: Cache) -> None:
    told: list[tuple[int, int]] = []
    cache.pull(store, Ref("one"), quiet, lambda done, total: told.append((done, total)))
    total = sum(len(c) for c in content(tmp_path / "one").values())
    assert told[-1] == (total, total)
    assert told == sorted(told)


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "x" * 65, "one@", "one@abc"])
def test_what_is_no_name_or_digest_is_refused(name: str, tmp_path: Path) -> None:
    settings = parse(f"store: {{root: {tmp_path}}}\nmodels: {{guide: {{}}}}", "t").store
    fails("E232", lambda: resolve(f"store:{name}", tmp_path, quiet, settings))


# ------------------------------------------------------------------------------------------------ on the way


def test_many_that_want_a_model_at_once_fetch_it_once(store: Watched, cache: Cache) -> None:
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(pull(Cache(cache.root, GIB), store, "one"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 6
    assert len(set(paths)) == 1
    assert len(store.reads) == len(set(store.reads)) == len(content(paths[0]))


def test_a_download_that_broke_off_goes_on_where_it_was(tmp_path: Path, store: Watched, cache: Cache) -> None:
    store.most_bytes = 1000
    fails("E231", lambda: pull(cache, store, "one"))
    store.most_bytes = None
    path = pull(cache, store, "one")
    assert content(path) == content(tmp_path / "one")
    assert (BIN, 1000) in store.reads


def test_a_wrong_beginning_left_by_a_former_run_is_found_and_fetched_anew(
    tmp_path: Path, store: Watched, cache: Cache
) -> None:
    weights = hashlib.sha256((tmp_path / "one" / BIN).read_bytes()).hexdigest()
    partial = cache.root / "blobs" / weights[:2] / f".{weights}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"not it")
    assert content(pull(cache, store, "one")) == content(tmp_path / "one")
    assert [offset for name, offset in store.reads if name == BIN] == [6, 0]


def test_content_that_is_damaged_in_the_store_never_gets_in(tmp_path: Path, store: Watched, cache: Cache) -> None:
    weights = hashlib.sha256((tmp_path / "one" / BIN).read_bytes()).hexdigest()
    blob = tmp_path / "store" / "blobs" / weights[:2] / weights
    blob.chmod(0o644)
    blob.write_bytes(b"\2" * blob.stat().st_size)
    error = fails("E233", lambda: pull(cache, store, "one"))
    assert BIN in error.what
    assert weights in error.fix
    assert not (cache.root / "blobs" / weights[:2] / weights).exists()


def test_a_blob_damaged_on_this_node_is_fetched_again_when_verified(store: Watched, cache: Cache) -> None:
    path = pull(cache, store, "one")
    sound = (path / BIN).read_bytes()
    (path / BIN).chmod(0o644)
    (path / BIN).write_bytes(b"\2" * len(sound))
    with (path / BIN).open("rb") as mapped:  # as an engine would that started with it
        assert (pull(cache, store, "one", verify=True) / BIN).read_bytes() == sound
        assert mapped.read(1) == b"\2"


def test_a_file_that_was_cut_off_on_this_node_is_noticed_at_the_next_start(store: Watched, cache: Cache) -> None:
    path = pull(cache, store, "one")
    sound = (path / BIN).read_bytes()
    (path / BIN).chmod(0o644)
    os.truncate(path / BIN, 10)
    assert (pull(cache, store, "one") / BIN).read_bytes() == sound


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ".hidden", ""])
def test_a_manifest_that_names_paths_is_refused(tmp_path: Path, store: Watched, cache: Cache, name: str) -> None:
    bad = Manifest(files=(File(name, "0" * 64, 1),))
    ref = DirectoryStore(tmp_path / "store").put("bad", msgspec.json.encode(bad))
    fails("E233", lambda: pull(cache, store, "bad", ref.digest))


def test_a_manifest_that_is_not_what_its_digest_says_is_refused(tmp_path: Path, store: Watched, cache: Cache) -> None:
    ref = Ref("one", store.latest("one"))
    path = DirectoryStore(tmp_path / "store").manifest_path(ref)
    path.write_bytes(path.read_bytes() + b" ")
    fails("E233", lambda: pull(cache, store, "one"))


# ------------------------------------------------------------------------------------------------ while it is away


def test_a_store_that_is_away_does_not_keep_what_is_here_from_starting(store: Watched, cache: Cache) -> None:
    path, digest = pull(cache, store, "one"), store.latest("one")
    store.away = True
    said: list[str] = []
    assert cache.pull(store, Ref("one"), said.append, untold) == path
    assert "the last one seen here" in said[0]
    assert pull(cache, store, "one", digest) == path
    fails("E231", lambda: pull(cache, store, "two"))


def test_a_model_that_the_store_does_not_have_is_told_from_a_store_that_is_not_there(
    tmp_path: Path, store: Watched, cache: Cache
) -> None:
    fails("E232", lambda: pull(cache, store, "three"))
    fails("E231", lambda: pull(cache, DirectoryStore(tmp_path / "unmounted"), "three"))
    fails("E230", lambda: resolve("store:one", tmp_path, quiet))


# ------------------------------------------------------------------------------------------------ room


def test_what_was_used_longest_ago_leaves_when_room_is_needed(tmp_path: Path, store: Watched) -> None:
    for name in ("three", "four"):
        model = model_directory(tmp_path / name)
        (model / BIN).write_bytes(name.encode() * 600_000)
        push(model, name, DirectoryStore(tmp_path / "store"), untold)
    cache = Cache(tmp_path / "cache", 7_000_000)  # two of them
    for name in ("one", "three"):
        os.utime(cache.root / "manifests" / name / f"{pull(cache, store, name) and store.latest(name)}.json", (1, 1))
    pull(cache, store, "one")  # used again
    pull(cache, store, "four")
    assert {e.name for e in cache.entries()} == {"one", "four"}
    assert cache.used_bytes() <= 7_000_000


def test_what_another_process_uses_is_never_evicted(tmp_path: Path, store: Watched) -> None:
    other = model_directory(tmp_path / "three")
    (other / BIN).write_bytes(b"3" * 3_000_000)
    push(other, "three", DirectoryStore(tmp_path / "store"), untold)
    cache = Cache(tmp_path / "cache", 4_000_000)
    path = pull(cache, store, "one")
    code = "import sys; from pathlib import Path; from neaptide.models.hold import hold; hold(Path(sys.argv[1]));"
    with subprocess.Popen(
        [sys.executable, "-c", code + "print(flush=True); sys.stdin.read()", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as user:
        assert user.stdout is not None
        user.stdout.readline()
        error = fails("E234", lambda: pull(cache, store, "three"))
        assert "store.cache_gib" in error.fix
        assert cache.prune(0) == 0
        assert cache.entries()[0].in_use
        user.kill()
    pull(cache, store, "three")
    assert [e.name for e in cache.entries()] == ["three"]
    assert not path.exists()


def test_room_that_a_download_under_way_will_need_is_not_given_away(tmp_path: Path, store: Watched) -> None:
    other = model_directory(tmp_path / "three")
    (other / BIN).write_bytes(b"3" * 3_000_000)
    push(other, "three", DirectoryStore(tmp_path / "store"), untold)
    cache, refused = Cache(tmp_path / "cache", 4_000_000), []

    def meanwhile(done: int, total: int) -> None:
        if not refused:
            refused.append(fails("E234", lambda: pull(Cache(cache.root, 4_000_000), store, "three")))

    path = cache.pull(store, Ref("one"), quiet, meanwhile)
    assert content(path) == content(tmp_path / "one")
    assert len(refused) == 1
    assert pull(cache, store, "three").exists()


def test_a_model_larger_than_its_disk_is_refused_before_a_byte_is_fetched(
    tmp_path: Path, store: Watched, cache: Cache
) -> None:
    huge = Manifest(files=(File("huge.bin", "0" * 64, 1 << 50),))
    ref = DirectoryStore(tmp_path / "store").put("huge", msgspec.json.encode(huge))
    fails("E234", lambda: pull(Cache(cache.root, 1 << 60), store, "huge", ref.digest))
    assert store.reads == []


def test_pruning_frees_what_nobody_uses_and_leaves_no_rest(store: Watched, cache: Cache) -> None:
    path = pull(cache, store, "one")
    held = hold(path)
    pull(cache, store, "two")
    freed = cache.prune(0)
    assert 0 < freed < 10_000  # the weights are shared with what is in use
    release(held)
    assert cache.prune(0) > 2_000_000
    assert cache.used_bytes() == 0
    assert list((cache.root / "models").iterdir()) == []


def test_a_plain_file_among_the_models_is_left_alone_and_in_nobodys_way(store: Watched, cache: Cache) -> None:
    pull(cache, store, "one")
    stray = cache.root / "models" / "notes.txt"
    stray.write_text("somebody's")
    pull(cache, store, "two")
    cache.prune(0)
    assert stray.read_text() == "somebody's"


# ------------------------------------------------------------------------------------------------ over http


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A plain file server, with Range or (as Python's own) without."""

    ranges = True

    def do_GET(self) -> None:
        start = self.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
        file = Path(self.translate_path(self.path))
        if not (start and self.ranges and file.is_file()):
            super().do_GET()
            return
        body = file.read_bytes()[int(start) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return None


@pytest.mark.parametrize("ranges", [True, False])
def test_a_directory_behind_a_web_server_is_a_store_with_and_without_ranges(
    tmp_path: Path, store: Watched, cache: Cache, ranges: bool
) -> None:
    class Handler(Ranges):
        def __init__(self, *args: object) -> None:
            self.ranges = ranges
            super().__init__(*args, directory=str(tmp_path / "store"))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        away = Watched(HttpStore(url))
        away.most_bytes = 1000
        fails("E231", lambda: pull(cache, away, "one"))
        away.most_bytes = None
        assert content(pull(cache, away, "one")) == content(tmp_path / "one")
        fails("E232", lambda: pull(cache, away, "three"))
        server.shutdown()
    fails("E231", lambda: pull(cache, HttpStore(url), "three"))


# ------------------------------------------------------------------------------------------------ the outside


def test_store_and_cache_in_one_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both") as error:
        parse("store: {root: ./w, cache: w}\nmodels: {guide: {}}", "t", tmp_path)
    assert error.value.code == "E108"


def test_the_verbs_push_pull_list_and_prune(tmp_path: Path) -> None:
    model_directory(tmp_path / "one")
    (tmp_path / "neaptide.yaml").write_text("store: {root: ./store, cache: ./cache}\nmodels: {guide: {}}\n")

    def told(*args: str) -> dict[str, object]:
        done = cli("models", *args, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    pushed = told("push", "./one", "one")
    assert pushed["new_bytes"] == pushed["bytes"]
    assert [(r["name"], r["latest"], r["here"]) for r in told("stored")["rows"]] == [("one", True, False)]  # type: ignore[attr-defined]
    path = Path(str(told("pull", f"one@{pushed['digest']}")["path"]))
    assert content(path) == content(tmp_path / "one")
    assert resolve("store:one", tmp_path, quiet, parse((tmp_path / "neaptide.yaml").read_text(), "t", tmp_path).store)
    assert [r["here"] for r in told("stored")["rows"]] == [True]  # type: ignore[attr-defined]
    assert told("prune", "--keep-gib", "1")["freed_bytes"] == 0
    assert told("prune")["freed_bytes"] == pushed["bytes"]
    refused = cli("models", "push", "./one", "one", "--store", "http://127.0.0.1:9/", cwd=tmp_path)
    assert refused.returncode == 1
    assert "E235" in refused.stderr


def test_an_engine_maps_the_blob_itself_and_keeps_it_from_being_pruned(tmp_path: Path, cache: Cache) -> None:
    store = DirectoryStore(tmp_path / "store")
    push(GUIDE, "guide", store, untold)
    path = pull(cache, store, "guide")
    options = {"kv_mib": 8, "threads": 1, "chunk_tokens": 64}
    replica = ReplicaProcess(tmp_path, engine="openvino", source=str(path), options=options)
    try:
        replica.client().close()
        weights = hashlib.sha256((path / BIN).read_bytes()).hexdigest()
        inode = (cache.root / "blobs" / weights[:2] / weights).stat().st_ino
        maps = [line.split() for line in Path(f"/proc/{replica.engine_pid()}/maps").read_text().splitlines()]
        assert "r--s" in {line[1] for line in maps if line[4] == str(inode)}
        assert cache.prune(0) == 0
    finally:
        replica.stop()


def test_a_service_serves_a_model_of_a_store_which_stays_in_its_cache(
    tmp_path: Path, serve: Callable[..., Service]
) -> None:
    push(GUIDE, "guide", DirectoryStore(tmp_path / "store"), untold)
    options = "{kv_mib: 8, threads: 1, chunk_tokens: 64}"
    service = serve(f"""
store: {{root: ./store, cache: ./cache}}
models:
  echo: {{source: "store:guide", options: {options}}}
""")
    assert chat(service, "What is a tide?", max_tokens=2).join(60).status == 200
    stored = json.loads(service.run("models", "stored", "--json").stdout)
    assert [(r["name"], r["latest"], r["here"], r["in_use"]) for r in stored["rows"]] == [("guide", True, True, True)]
    assert json.loads(service.run("models", "prune", "--json").stdout)["freed_bytes"] == 0
