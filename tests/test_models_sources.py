"""Where a model comes from, and what is said when it is not there, not whole or not converted."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from neaptide.errors import ModelError
from neaptide.models import directory
from neaptide.models.sources import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
XML = '<?xml version="1.0"?>\n<net name="m">{}<rt_info><mode value="int4_asym" /></rt_info>\n</net>\n'


def model_directory(path: Path, config: dict[str, object] | None = None, xml: str = XML) -> Path:
    path.mkdir(parents=True)
    (path / "openvino_model.xml").write_text(xml)
    (path / "openvino_model.bin").write_bytes(b"\1" * 3_000_000)
    (path / "tokenizer.json").write_text("{}")
    (path / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    return path


def quiet(_: str) -> None:
    return None


def test_a_directory_is_read_into_the_facts_that_an_engine_needs(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "small-ov")
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 7]}')
    (path / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "from config"}'
    )
    (path / "chat_template.jinja").write_text("from file")

    model = resolve(str(path), tmp_path / "cache", quiet)

    assert (model.name, model.path) == ("small-ov", path)
    assert (model.context_tokens, model.vocab_size, model.layers) == (2048, 100, 3)
    assert (model.kv_heads, model.head_dim) == (2, 16)
    assert model.eos_token_ids == (7, 2)
    assert (model.bos_token_id, model.bos_token, model.eos_token) == (1, "<s>", "</s>")
    assert model.chat_template == "from file"
    assert (model.weight_bytes, model.precision) == (3_000_000, "int4")
    assert model.kv_bytes_per_token() == 2 * 3 * 2 * 16 * 2


def test_the_default_of_several_named_templates_is_taken(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m")
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert directory.read(path).chat_template == "plain"


@pytest.mark.parametrize(("constant", "label"), [("bf16", "bf16"), ("f16", "f16"), ("f32", "f32")])
def test_the_precision_of_uncompressed_weights_is_that_of_their_constants(
    tmp_path: Path, constant: str, label: str
) -> None:
    body = f'<data element_type="f32" /><data element_type="{constant}" />'
    path = model_directory(tmp_path / "m", xml=f"<net>{body}</net>")
    assert directory.read(path).precision == label


def test_the_digest_follows_files_and_samples_of_the_weights_but_not_notes(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m")
    first = directory.read(path)
    (path / "openvino_model.bin").write_bytes(b"\2" * 3_000_000)
    other_weights = directory.read(path)
    (path / "tokenizer.json").write_text('{"a": 1}')
    other_tokenizer = directory.read(path)
    (path / "README.md").write_text("notes are not the model")

    assert len({first.digest, other_weights.digest, other_tokenizer.digest}) == 3
    assert first.content_digest() == other_weights.content_digest()  # lazily: both read the disk as it is now
    assert directory.read(path).digest == other_tokenizer.digest


@pytest.mark.parametrize("file", directory.REQUIRED)
def test_a_missing_or_empty_file_is_named(tmp_path: Path, file: str) -> None:
    path = model_directory(tmp_path / "m")
    (path / file).write_bytes(b"")
    with pytest.raises(ModelError, match=file) as empty:
        directory.read(path)
    (path / file).unlink()
    with pytest.raises(ModelError, match=f"{file} is missing") as missing:
        directory.read(path)
    assert empty.value.code == missing.value.code == "E202"
    assert missing.value.fix


def test_a_model_description_that_was_cut_off_is_told_from_a_whole_one(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m", xml=XML[:40])
    with pytest.raises(ModelError, match="cut off"):
        directory.read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"vocab_size": "100"}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"eos_token_id": None}, "eos_token_id"),
        ({"eos_token_id": 100}, "eos_token_id 100"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
    ],
)
def test_a_config_that_cannot_be_served_names_its_key(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = model_directory(tmp_path / "m", config=change)
    with pytest.raises(ModelError, match=words) as error:
        directory.read(path)
    assert error.value.code == "E202"


@pytest.mark.parametrize("broken", [b"{", b'{"a": "\xff"}'])
def test_json_that_does_not_parse_is_named(broken: bytes, tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m")
    (path / "generation_config.json").write_bytes(broken)
    with pytest.raises(ModelError, match=r"generation_config\.json is not JSON"):
        directory.read(path)


def test_a_hugging_face_directory_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "llama"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError) as error:
        resolve(str(path), tmp_path / "cache", quiet)
    assert error.value.code == "E203"
    assert f"neaptide models convert {path} --to int8" in error.value.fix


@pytest.mark.parametrize("source", ["./none", "/none/at/all", "none", "a/b/c"])
def test_a_source_that_is_nowhere_is_not_looked_up_on_the_hub(tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelError, match="does not exist") as error:
        resolve(source, tmp_path / "cache", quiet)
    assert error.value.code == "E201"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of a model hub that a download asks for."""

    files: ClassVar[dict[str, bytes]]
    refusal = ""
    downloads: ClassVar[list[str]]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.refusal:
            return self._send(403 if self.refusal == "GatedRepo" else 404, b"{}", {"X-Error-Code": self.refusal})
        if path.startswith("/api/models/org/name"):
            listed = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": f} for f in self.files]}
            if "/tree/" in path:
                tree = [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in self.files.items()]
                return self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            return self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        content = self.files.get(path.rpartition("/")[2])
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if body:
            self.downloads.append(path)
        return self._send(200, content if body else b"", headers, len(content))

    def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    model = model_directory(tmp_path / "on-the-hub")

    class Handler(Hub):
        files: ClassVar[dict[str, bytes]] = {f.name: f.read_bytes() for f in model.iterdir()}
        downloads: ClassVar[list[str]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.server_version = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Handler
    server.shutdown()
    thread.join()
    server.server_close()


SCRIPT = """
import json, sys
from pathlib import Path
from typing import ClassVar
if sys.argv[3] == "without-extra":
    sys.modules["huggingface_hub"] = None
from neaptide.errors import ModelError
from neaptide.models.sources import resolve
lines = []
try:
    model = resolve(sys.argv[1], Path(sys.argv[2]), lines.append)
    print(json.dumps({"path": str(model.path), "name": model.name, "lines": lines}))
except ModelError as e:
    print(json.dumps(e.as_dict()))
"""


def resolve_elsewhere(source: str, cache: Path, endpoint: str, extra: str = "") -> dict[str, object]:
    """resolve() in a process of its own: the hub's client reads its endpoint once, at import."""
    pytest.importorskip("huggingface_hub", reason="the optional extra `hub` is not installed")
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache / "hf")}
    environment = {k: v for k, v in environment.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, source, str(cache), extra],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_converted_model_is_downloaded_once_at_a_pinned_commit(tmp_path: Path, hub: type[Hub]) -> None:
    cache = tmp_path / "cache"
    first = resolve_elsewhere("org/name", cache, hub.server_version)
    downloads = list(hub.downloads)
    second = resolve_elsewhere("org/name", cache, "http://127.0.0.1:1")

    assert first["path"] == second["path"] == str(cache / "org--name")
    assert (first["name"], second["lines"]) == ("org/name", [])
    assert any(COMMIT[:12] in line for line in first["lines"])  # type: ignore[attr-defined]
    assert sorted(f.rpartition("/")[2] for f in downloads) == sorted(directory.REQUIRED)
    assert sorted(f.name for f in cache.iterdir() if f.name != "hf") == ["org--name"]


@pytest.mark.parametrize(
    ("refusal", "code", "fix"), [("RepoNotFound", "E205", "check the id"), ("GatedRepo", "E206", "HF_TOKEN")]
)
def test_what_the_hub_refuses_is_told_apart(tmp_path: Path, hub: type[Hub], refusal: str, code: str, fix: str) -> None:
    hub.refusal = refusal
    error = resolve_elsewhere("org/name", tmp_path / "cache", hub.server_version)
    assert error["code"] == code
    assert fix in str(error["fix"])


def test_a_checkpoint_on_the_hub_that_was_never_converted_is_refused_and_not_kept(
    tmp_path: Path, hub: type[Hub]
) -> None:
    hub.files = {"config.json": b"{}", "tokenizer.json": b"{}"}
    error = resolve_elsewhere("org/name", tmp_path / "cache", hub.server_version)
    assert error["code"] == "E203"
    assert "neaptide models convert" in str(error["fix"])
    assert not [f for f in (tmp_path / "cache").iterdir() if f.name != "hf"]


def test_without_a_network_the_fix_says_how_to_go_on(tmp_path: Path) -> None:
    error = resolve_elsewhere("org/name", tmp_path / "cache", "http://127.0.0.1:1")
    assert error["code"] == "E204"
    assert "network" in str(error["fix"])
    assert not list((tmp_path / "cache").glob("org*"))


def test_without_the_extra_the_error_names_the_pip_command(tmp_path: Path) -> None:
    error = resolve_elsewhere("org/name", tmp_path / "cache", "http://127.0.0.1:1", "without-extra")
    assert error["code"] == "E207"
    assert "neaptide[hub]" in str(error["fix"])
