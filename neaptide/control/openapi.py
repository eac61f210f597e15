"""OpenAPI 3.1 documents of the admin API and of the inference API, generated from the structs that are spoken.

Texts come from one catalogue in English and Chinese (static/words.json): "op.<id>" for an operation, "field.<name>" or
"<Schema>.<name>" for a field, "schema.<Schema>" for a schema. The documents are served in English;
the page renders either.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import msgspec

from neaptide import __version__
from neaptide.control.admin import OPERATIONS, Operation
from neaptide.control.inference import HEADERS, SERVICES, OpenAIErrorBody, Service
from neaptide.control.roles import need_of

REFS = "#/components/schemas/{name}"
STATIC = Path(__file__).with_name("static")
LANGUAGES = ("en", "zh")
Json = dict[str, Any]


class ErrorFields(msgspec.Struct):
    """What happened, what was expected, what to type. `code` is stable; docs/errors.md lists them."""

    code: str
    what: str
    why: str
    fix: str


class ErrorBody(msgspec.Struct):
    """Every error answer of the admin API."""

    error: ErrorFields


@functools.cache
def catalogue() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((STATIC / "words.json").read_text(encoding="utf-8"))
    return found


def text(key: str, language: str) -> str:
    """The catalogue's text; KeyError for a missing key."""
    return catalogue()[key][language]


def _maybe(key: str, language: str) -> str:
    return catalogue().get(key, {}).get(language, "")


# --- the admin API ----------------------------------------------------------------------------------------------------


def admin_document(base_url: str, language: str = "en") -> Json:
    """The admin API at `base_url` (no slash at its end)."""
    kinds = [op.answer for op in OPERATIONS] + [op.body for op in OPERATIONS if op.body not in (None, str)]
    refs, schemas = _schemas([*kinds, *(op.query for op in OPERATIONS), ErrorBody], language)
    queries = {op.query.__name__ for op in OPERATIONS}
    paths: Json = {}
    for op in OPERATIONS:
        paths.setdefault(f"/api/v1{op.path}", {})[op.method.lower()] = _admin_operation(op, refs, schemas, language)
    paths["/health"] = {"get": _admin_health(language)}
    kept = {name: schema for name, schema in schemas.items() if name not in queries}
    words = text("admin.title", language), text("admin.about", language), text("bearer.admin", language)
    return _document(*words, base_url, paths, kept)


def _admin_operation(op: Operation, refs: dict[Any, Json], schemas: Json, language: str) -> Json:
    parameters = [_path_parameter(name, language) for name in _placeholders(op.path)]
    parameters += _query_parameters(schemas[op.query.__name__], language)
    need = need_of(op.method, f"/api/v1{op.path}")
    out: Json = {"operationId": op.id, "summary": text(f"op.{op.id}", language)}
    out |= {"description": text(f"role.{need.least}", language), "security": [{"bearer": [need.least]}]}
    out |= {"parameters": parameters} if parameters else {}
    if op.body is str:
        content = {"application/yaml": {"schema": {"type": "string"}}}
        out["requestBody"] = {"required": True, "content": content}
    elif op.body is not None:
        out["requestBody"] = {"required": True, "content": {"application/json": {"schema": refs[op.body]}}}
    errors = [400, 401, 403, *([404] if "{" in op.path else []), *([413] if op.body else []), 500]
    errors += [507] if need.action else []
    ok = {"description": text(f"status.{op.status}", language), "content": _json(refs[op.answer])}
    out["responses"] = {str(op.status): ok, **_errors(errors, refs[ErrorBody], language)}
    return out


def _admin_health(language: str) -> Json:
    ok = {"description": text("status.200", language), "content": _json({"type": "object"})}
    return {"operationId": "getHealth", "summary": text("op.getHealth", language), "security": [],
            "responses": {"200": ok}}  # fmt: skip


def _placeholders(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def _path_parameter(name: str, language: str) -> Json:
    about = text(f"path.{name}", language)
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": about}


def _query_parameters(schema: Json, language: str) -> list[Json]:
    required = schema.get("required", [])
    out = []
    for name, field in schema["properties"].items():
        plain = {k: v for k, v in field.items() if k != "description"}
        about = field.get("description") or _maybe(f"field.{name}", language)
        out.append({"name": name, "in": "query", "required": name in required, "schema": plain, "description": about})
    return out


# --- the inference API ------------------------------------------------------------------------------------------------


def inference_document(base_url: str, language: str = "en") -> Json:
    """The inference API at `base_url` (without /v1, no slash at its end)."""
    kinds: list[Any] = [kind for s in SERVICES for kind in (s.answer, s.body, s.chunk) if isinstance(kind, type)]
    structs = [kind for kind in kinds if issubclass(kind, msgspec.Struct)]
    refs, schemas = _schemas([*structs, OpenAIErrorBody], language)
    paths: Json = {}
    for s in SERVICES:
        paths.setdefault(s.path, {})[s.method.lower()] = _service(s, refs, language)
    words = text("inference.title", language), text("inference.about", language), text("bearer.inference", language)
    return _document(*words, base_url, paths, schemas)


def _service(s: Service, refs: dict[Any, Json], language: str) -> Json:
    out: Json = {"operationId": s.id, "summary": text(f"service.{s.id}", language)}
    out["security"] = [] if s.open else [{"bearer": []}]
    if s.body is None:
        parameters = [_path_parameter(name, language) for name in _placeholders(s.path)]
        out |= {"parameters": parameters} if parameters else {}
    else:
        out["parameters"] = [
            {"name": name, "in": "header", "schema": schema, "description": text(f"header.{name}", language)}
            for name, schema in HEADERS
        ]
        out["requestBody"] = {"required": True, "content": _json(refs[s.body])}
    if s.answer is str:
        content: Json = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = _json(refs[s.answer])
    if s.chunk is not None:
        content["text/event-stream"] = {"schema": refs[s.chunk]}
    ok = {"description": text("status.200", language), "content": content}
    out["responses"] = {"200": ok, **_errors(s.errors, refs[OpenAIErrorBody], language)}
    if s.unready:
        out["responses"] |= _errors((503,), refs[s.answer], language)
    return out


# --- shared -----------------------------------------------------------------------------------------------------------


def _document(title: str, about: str, secret: str, base_url: str, paths: Json, schemas: Json) -> Json:
    bearer = {"bearer": {"type": "http", "scheme": "bearer", "description": secret}}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__, "description": about, "license": {"name": "Apache-2.0"}},
        "servers": [{"url": base_url}],
        "paths": paths,
        "components": {"schemas": dict(sorted(schemas.items())), "securitySchemes": bearer},
    }


def _schemas(kinds: list[Any], language: str) -> tuple[dict[Any, Json], Json]:
    """({struct: its $ref}, {name: schema}), with the catalogue's texts on fields."""
    unique = list(dict.fromkeys(kinds))
    refs, schemas = msgspec.json.schema_components(unique, ref_template=REFS)
    for name, schema in schemas.items():
        schema.pop("title", None)
        about = _maybe(f"schema.{name}", language)
        schema |= {"description": about} if about else {}
        for field, shape in schema.get("properties", {}).items():
            about = _maybe(f"{name}.{field}", language) or _maybe(f"field.{field}", language)
            if about:
                shape["description"] = about
    return dict(zip(unique, refs)), schemas


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _errors(statuses: Any, schema: Json, language: str) -> Json:
    out: Json = {}
    for status in statuses:
        out[str(status)] = {"description": text(f"status.{status}", language), "content": _json(schema)}
        if status in (429, 503):
            seconds = {"schema": {"type": "integer"}, "description": text("header.retry-after", language)}
            out[str(status)]["headers"] = {"Retry-After": seconds}
    return out
