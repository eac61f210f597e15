"""Both OpenAPI documents are sound, say what is really spoken, and are drawn on a page that needs no other host."""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from neaptide.control import inference, openapi
from neaptide.control.admin import OPERATIONS
from neaptide.wire import bodies, parse
from tests.admin_fake import TOKEN, FakeControl, admin_server

DOCUMENTS = {
    (name, language): build("http://127.0.0.1:1", language)
    for name, build in (("admin", openapi.admin_document), ("inference", openapi.inference_document))
    for language in openapi.LANGUAGES
}
Json = dict[str, Any]
CHROMIUM = next((found for n in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(n))), None)


@pytest.fixture(params=list(DOCUMENTS), ids="-".join)
def document(request: pytest.FixtureRequest) -> Json:
    return DOCUMENTS[request.param]


def nodes(tree: Any) -> Iterator[Json]:
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for inner in tree:
            yield from nodes(inner)


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_it_is_openapi_3_1_with_title_version_and_server(document: Json) -> None:
    assert document["openapi"] == "3.1.0"
    assert set(document) == {"openapi", "info", "servers", "paths", "components"}
    assert document["info"]["title"]
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", document["info"]["version"])


def test_every_reference_resolves(document: Json) -> None:
    schemas = document["components"]["schemas"]
    references = {node["$ref"] for node in nodes(document) if "$ref" in node}
    assert references
    for reference in references:
        head, _, name = reference.rpartition("/")
        assert head == "#/components/schemas"
        assert name in schemas


def test_every_schema_is_used(document: Json) -> None:
    used = {node["$ref"].rpartition("/")[2] for node in nodes(document) if "$ref" in node}
    assert set(document["components"]["schemas"]) == used


def test_every_operation_has_an_id_of_its_own_a_summary_and_answers(document: Json) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids))
    for path, method, operation in operations(document):
        assert operation["summary"], (path, method)
        assert any(status.startswith("2") for status in operation["responses"]), (path, method)
        for status, answer in operation["responses"].items():
            assert re.fullmatch(r"[2-5]\d\d", status)
            assert answer["description"]
            assert answer["content"]
        assert "security" in operation


def test_path_parameters_are_declared_and_no_others(document: Json) -> None:
    for path, _, operation in operations(document):
        declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert declared == set(re.findall(r"\{(\w+)\}", path))
        for parameter in operation.get("parameters", []):
            assert parameter["description"]
            assert "schema" in parameter


def test_every_schema_and_every_field_is_explained(document: Json) -> None:
    for name, schema in document["components"]["schemas"].items():
        assert schema["description"], name
        for field, shape in schema["properties"].items():
            assert shape.get("description"), (name, field)
        assert set(schema.get("required", [])) <= set(schema["properties"])


def test_both_languages_describe_the_same_api() -> None:
    def bare(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: bare(v) for k, v in tree.items() if k not in ("description", "summary", "title")}
        return [bare(x) for x in tree] if isinstance(tree, list) else tree

    for name in ("admin", "inference"):
        assert bare(DOCUMENTS[name, "en"]) == bare(DOCUMENTS[name, "zh"])
        texts = [n["description"] for n in nodes(DOCUMENTS[name, "zh"]) if isinstance(n.get("description"), str)]
        assert all(re.search(r"[\u4e00-\u9fff]", text) for text in texts), [t for t in texts if t.isascii()]


def test_the_admin_document_has_every_route_and_nothing_else() -> None:
    spoken = {(f"/api/v1{op.path}", op.method.lower()) for op in OPERATIONS} | {("/health", "get")}
    assert {(path, method) for path, method, _ in operations(DOCUMENTS["admin", "en"])} == spoken


def test_the_inference_document_has_the_gateways_routes() -> None:
    spoken = {(path, method) for path, method, _ in operations(DOCUMENTS["inference", "en"])}
    assert spoken == {
        ("/v1/models", "get"), ("/v1/models/{model}", "get"),
        ("/v1/chat/completions", "post"), ("/v1/completions", "post"), ("/tokenize", "post"),
        ("/health", "get"), ("/health/ready", "get"), ("/version", "get"), ("/metrics", "get"),
    }  # fmt: skip


# What the parser reads only to refuse it is no part of the API.
REFUSED = {"n", "best_of", "logit_bias", "tools", "tool_choice", "functions", "function_call", "audio", "modalities"}
REFUSED |= {"echo", "suffix"}


@pytest.mark.parametrize(
    ("described", "parsed"),
    [
        (inference.ChatCompletionRequest, bodies.ChatBody),
        (inference.CompletionRequest, bodies.CompletionBody),
        (inference.TokenizeRequest, bodies.TokenizeBody),
    ],
)
def test_request_bodies_are_described_as_the_replica_parses_them(
    described: type[msgspec.Struct], parsed: type[msgspec.Struct]
) -> None:
    assert set(described.__struct_fields__) == set(parsed.__struct_fields__) - REFUSED


def test_what_the_document_allows_the_parser_reads() -> None:
    body = {
        "model": "guide", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "stop": ["\n"],
        "seed": 7, "max_completion_tokens": 5, "min_tokens": 1, "response_format": {"type": "text"},
    }  # fmt: skip
    raw = msgspec.json.encode(body)
    msgspec.json.decode(raw, type=inference.ChatCompletionRequest)
    assert parse.parse_chat(raw).ignored == ()


class Page(HTMLParser):
    """What a page points to, its ids and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.lang = self.text = ""
        self.inline: list[str] = []
        self._tag = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self._tag = tag
        self.lang = self.lang or (told.get("lang") or "") if tag == "html" else self.lang
        self.ids += [told["id"] or ""] if "id" in told else []
        self.targets += [(tag, told[name] or "") for name in ("href", "src", "action") if name in told]
        self.inline += [name for name in told if name.startswith("on") or name == "style"]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._tag in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with admin_server(FakeControl(tmp_path_factory.mktemp("docs"), "http://127.0.0.1:8123/v1")) as url:
        yield url.rstrip("/")


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("language", openapi.LANGUAGES)
def test_the_page_asks_nothing_of_other_hosts_and_its_links_lead_somewhere(site: str, language: str) -> None:
    page = Page(get(f"{site}/docs?lang={language}"))
    assert len(page.ids) == len(set(page.ids))
    assert page.inline == []  # the content security policy would drop it
    for tag, target in page.targets:
        if target.startswith("#"):
            assert target[1:] in page.ids, target
        elif tag != "a" or not target.startswith("?lang="):
            assert target == "data:," or re.fullmatch(r"/[\w./-]+", target), target
            if target != "data:,":
                assert get(site + target)


def test_the_page_speaks_the_language_that_is_asked_for(site: str) -> None:
    assert Page(get(f"{site}/docs?lang=zh")).lang == "zh-CN"
    assert Page(get(f"{site}/docs", **{"Accept-Language": "zh-CN,zh;q=0.9"})).lang == "zh-CN"
    assert Page(get(f"{site}/docs", **{"Accept-Language": "de,zh"})).lang == "en"
    assert Page(get(f"{site}/docs?lang=xx")).lang == "en"


def test_every_operation_and_field_is_on_the_page(site: str) -> None:
    for language in openapi.LANGUAGES:
        text = Page(get(f"{site}/docs?lang={language}")).text
        for name in ("admin", "inference"):
            document = DOCUMENTS[name, language]
            for path, _, operation in operations(document):
                assert path in text
                assert operation["summary"] in text
            for schema, shape in document["components"]["schemas"].items():
                assert schema in text
                assert all(field["description"] in text for field in shape["properties"].values())


def test_the_commands_on_the_page_are_real(site: str, tmp_path: Path) -> None:
    """Every curl command of the admin API runs as it stands and succeeds."""
    (tmp_path / ".neaptide").mkdir()
    (tmp_path / ".neaptide" / "admin-token").write_text(TOKEN)
    (tmp_path / "neaptide.yaml").write_text("models: {guide: {}}\n")
    text = Page(get(f"{site}/docs")).text
    commands = [c for c in re.findall(r"^ *(curl (?:.|\\\n)*?[^\\])$", text, re.M) if site in c]
    assert len(commands) == len(OPERATIONS) + 1
    if shutil.which("curl") is None:
        pytest.skip("SKIPPED LOUDLY: curl is not installed, the page's commands were not run")
    ask = urllib.request.Request(
        f"{site}/api/v1/admins", b'{"role": "viewer"}', {"Authorization": f"Bearer {TOKEN}"}, method="POST"
    )
    with urllib.request.urlopen(ask, timeout=20) as answer:
        admin = msgspec.json.decode(answer.read())["info"]["id"]
    for command in commands:
        command = command.replace("KEY_ID", "k1").replace("ADMIN_ID", admin)
        done = subprocess.run(
            ["bash", "-c", f"{command} --fail-with-body -sS"], cwd=tmp_path, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_inference_examples_use_the_real_address(site: str) -> None:
    text = Page(get(f"{site}/docs")).text
    assert "curl http://127.0.0.1:8123/v1/chat/completions" in text
    assert 'base_url="http://127.0.0.1:8123/v1"' in text


@pytest.mark.skipif(CHROMIUM is None, reason="SKIPPED LOUDLY: no chromium here, the page was not drawn")
@pytest.mark.parametrize("language", openapi.LANGUAGES)
def test_a_browser_draws_the_page(site: str, tmp_path: Path, language: str) -> None:
    shot = tmp_path / "docs.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]  # fmt: skip
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path}/profile", "--window-size=1280,1600"]
    done = subprocess.run(
        [*command, f"--screenshot={shot}", f"{site}/docs?lang={language}"], capture_output=True, text=True, timeout=90
    )
    assert shot.exists(), done.stderr
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 30_000  # a blank page of this size takes about 7 KB
