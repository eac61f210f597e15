"""The admin listener's pages: the API documents as JSON, and as one readable page that asks nothing of other hosts.

/docs is rendered on the server, in English or Chinese (?lang=, else Accept-Language), light or dark as the browser
wishes; its script only adds a theme switch and copy buttons, the page is whole without it.
"""

from __future__ import annotations

import json
import shlex
from typing import Any, NamedTuple

import jinja2
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from neaptide import __version__
from neaptide.control import openapi
from neaptide.control.port import ControlPort

ASSETS = {"docs.css": "text/css; charset=utf-8", "docs.js": "text/javascript; charset=utf-8"}
ADMIN = '"$(cat .neaptide/admin-token)"'
EXAMPLES: dict[str, Any] = {
    "createChatCompletion": {"model": "guide", "messages": [{"role": "user", "content": "What is TTFT?"}]},
    "createCompletion": {"model": "guide", "prompt": "Neaptide is", "max_tokens": 32},
    "tokenize": {"model": "guide", "prompt": "What is TTFT?"},
    "createKey": {"name": "my laptop"},
    "setKey": {"rpm": 60, "concurrency": 4},
    "setBudget": {"scope": "tenant:acme", "unit": "money", "amount": 100, "period": "month"},
    "setScale": {"model": "guide", "replicas": 2, "for_s": 7200},
    "createAdmin": {"role": "viewer", "name": "ann"},
}
QUERIES = {
    "apply": "dry_run=1",
    "getUsageTotals": "by=model",
    "listUsage": "limit=20",
    "explainScale": "model=guide",
    "clearScale": "model=guide",
    "removeBudget": "id=tenant:acme:money:month",
    "listShadows": "days=7",
    "listAudit": "limit=20",
    "down": "grace_s=20",
}
PLACES = {"{id}": "KEY_ID", "{admin}": "ADMIN_ID", "{model}": "guide"}


class Piece(NamedTuple):
    """A part of a type's name; `ref` is the schema it links to."""

    text: str
    ref: str = ""


def routes(control: ControlPort) -> tuple[BaseRoute, ...]:
    """/docs, its assets and the two documents."""
    pages = Pages(control)
    return (
        Route("/openapi.json", pages.admin),
        Route("/openapi-inference.json", pages.inference),
        Route("/docs", pages.docs),
        Route("/docs/{name}", pages.asset),
    )


class Pages:
    """Documents for whoever asks; built for the address that was asked."""

    def __init__(self, control: ControlPort) -> None:
        self._control = control
        self._api = ""
        loader = jinja2.FileSystemLoader(openapi.STATIC)
        environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        self._template = environment.get_template("docs.html")
        self._assets = {name: (openapi.STATIC / name).read_bytes() for name in ASSETS}

    async def admin(self, request: Request) -> Response:
        return _json(openapi.admin_document(_base(request)))

    async def inference(self, request: Request) -> Response:
        return _json(openapi.inference_document(await self._inference_base()))

    async def docs(self, request: Request) -> Response:
        language = _language(request)
        inference = openapi.inference_document(await self._inference_base(), language)
        admin = openapi.admin_document(_base(request), language)
        page = self._template.render(
            lang=language,
            say=lambda key: openapi.text(key, language),
            version=__version__,
            apis=[_api("inference", inference), _api("admin", admin)],
        )
        return Response(page, media_type="text/html; charset=utf-8", headers={"vary": "accept-language"})

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._assets:
            return Response("not found", 404, media_type="text/plain")
        return Response(self._assets[name], headers={"content-type": ASSETS[name]})

    async def _inference_base(self) -> str:
        """The gateway's address; it stays for the life of the process, so control is asked once."""
        if not self._api:
            self._api = (await self._control.status()).api_url.removesuffix("/v1")
        return self._api


def _base(request: Request) -> str:
    return f"{request.url.scheme}://{request.headers['host']}"


def _language(request: Request) -> str:
    asked = request.query_params.get("lang")
    if asked in openapi.LANGUAGES:
        return asked
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


def _json(document: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


# --- what the template shows ------------------------------------------------------------------------------------------


def _api(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """One document, flattened for the template."""
    base = document["servers"][0]["url"]
    operations = [
        _operation(name, base, path, method, op)
        for path, methods in document["paths"].items()
        for method, op in methods.items()
    ]
    schemas = [_schema(n, schema) for n, schema in document["components"]["schemas"].items()]
    return {"name": name, "base": base, "info": document["info"], "operations": operations, "schemas": schemas}


def _operation(api: str, base: str, path: str, method: str, op: dict[str, Any]) -> dict[str, Any]:
    responses = []
    for status, response in op["responses"].items():
        forms = [(kind, pieces(form["schema"])) for kind, form in response.get("content", {}).items()]
        responses.append({"status": status, "about": response["description"], "forms": forms})
    content = op.get("requestBody", {}).get("content", {})
    return {
        "id": f"{api}-{op['operationId']}",
        "method": method.upper(),
        "path": path,
        "summary": op["summary"],
        "open": not op["security"],
        "role": op.get("description", ""),
        "parameters": [
            {"name": p["name"], "place": p["in"], "type": pieces(p["schema"]), "about": p["description"]}
            for p in op.get("parameters", [])
        ],
        "body": [(kind, pieces(form["schema"])) for kind, form in content.items()],
        "responses": responses,
        "curl": _curl(api, base, path, method.upper(), op),
    }


def _curl(api: str, base: str, path: str, method: str, op: dict[str, Any]) -> str:
    """A command that works as it stands, given the key or the token."""
    name = op["operationId"]
    query = QUERIES.get(name) if api == "admin" else None
    target = f"{base}{path}{'?' + query if query else ''}"
    for place, word in PLACES.items():
        target = target.replace(place, word)
    parts = ["curl", *([] if method in ("GET", "POST") else ["-X", method]), shlex.quote(target)]
    if op["security"]:
        secret = '"$OPENAI_API_KEY"' if api == "inference" else ADMIN
        parts += ["\\\n  --oauth2-bearer", secret]
    example = EXAMPLES.get(name)
    if "application/yaml" in op.get("requestBody", {}).get("content", {}):
        parts += ["\\\n  --data-binary @neaptide.yaml"]
    elif example is not None and "requestBody" in op:
        body = shlex.quote(json.dumps(example, ensure_ascii=False))
        parts += ["\\\n  -H 'content-type: application/json'", f"\\\n  -d {body}"]
    elif method == "POST":
        parts += ["-X POST"]
    return " ".join(parts)


def _schema(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    required = schema.get("required", [])
    rows = [
        {
            "name": field,
            "type": pieces(shape),
            "required": field in required,
            "default": json.dumps(shape["default"], ensure_ascii=False) if "default" in shape else "",
            "about": shape.get("description", ""),
        }
        for field, shape in schema.get("properties", {}).items()
    ]
    return {"name": name, "about": schema.get("description", ""), "rows": rows}


def pieces(schema: dict[str, Any]) -> list[Piece]:
    """A schema as a short type: "array of Message | null", its schemas linked."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return [Piece(name, name)]
    if "anyOf" in schema:
        out: list[Piece] = []
        for i, option in enumerate(schema["anyOf"]):
            out += [Piece(" | "), *pieces(option)] if i else pieces(option)
        return out
    if "enum" in schema:
        return [Piece(" | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"]))]
    if schema.get("type") == "array":
        inner = pieces(schema["items"]) if isinstance(schema.get("items"), dict) else [Piece("any")]
        return [Piece("array of "), *inner]
    return [Piece(f"{schema.get('type', 'any')}{_bounds(schema)}")]


def _bounds(schema: dict[str, Any]) -> str:
    signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("maxLength", "chars ≤"))
    told = [f"{sign} {schema[key]:g}" for key, sign in signs if key in schema]
    return f" ({', '.join(told)})" if told else ""
