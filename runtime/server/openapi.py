"""The OpenAPI document: what FastAPI sees of the routes, and what it cannot see.

Bodies are read by `bodies.py` and not by FastAPI, so their schemas are joined here; so are errors, which are
alike everywhere, and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .api import ChatBody, CompletionBody, DetokenizeBody, TokenizeTalk, TokenizeText
from .limits import OPEN_PATHS
from .service import Service

TAKES: Mapping[str, tuple[type[BaseModel], ...]] = {
    "/v1/completions": (CompletionBody,),
    "/v1/chat/completions": (ChatBody,),
    "/tokenize": (TokenizeText, TokenizeTalk),
    "/detokenize": (DetokenizeBody,),
}
STREAMS = ("/v1/completions", "/v1/chat/completions")

_REF = "#/components/schemas/{model}"
_NULLABLE = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE,
                "code": _NULLABLE,
            },
        }
    },
}
_COUNT = {"type": "integer", "minimum": 0}
_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["text_completion", "chat.completion"]},
        "created": _COUNT,
        "model": {"type": "string"},
        "choices": {
            "type": "array",
            "items": {"type": "object", "required": ["index", "finish_reason", "logprobs"]},
        },
        "usage": {
            "type": "object",
            "properties": dict.fromkeys(
                ("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT
            ),
        },
    },
}
_TOKENS = {
    "type": "object",
    "required": ["count", "max_model_len", "tokens"],
    "properties": {
        "count": _COUNT,
        "max_model_len": _COUNT,
        "tokens": {"type": "array", "items": _COUNT},
        "token_strs": {"type": ["array", "null"], "items": {"type": "string"}},
    },
}
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_TEXT = {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}}
GIVES: Mapping[str, Any] = {
    "/v1/completions": _ANSWER,
    "/v1/chat/completions": _ANSWER,
    "/tokenize": _TOKENS,
    "/detokenize": _TEXT,
}


class Application(FastAPI):
    """FastAPI, whose document knows the bodies too."""

    def __init__(self, service: Service) -> None:
        super().__init__(title="mnemoc", docs_url=None, redoc_url=None)
        self._keyed = bool(service.options.limits.api_keys)

    def openapi(self) -> dict[str, Any]:
        """Made at the first call, for the routes that are there then."""
        if self.openapi_schema is None:
            document = get_openapi(title=self.title, version=self.version, routes=self.routes)
            self.openapi_schema = _completed(document, self._keyed)
        return self.openapi_schema


def _completed(document: dict[str, Any], keyed: bool) -> dict[str, Any]:
    models = {model for kinds in TAKES.values() for model in kinds}
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    document["components"] = {"schemas": {**found["$defs"], "Error": _ERROR}}
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's word for what is a 400 here
            operation["responses"]["default"] = {
                "description": "An error, in OpenAI's words",
                "content": _json({"$ref": _REF.format(model="Error")}),
            }
            if keyed and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
        if path in TAKES:
            _describe_post(path, operations["post"])
    return document


def _describe_post(path: str, operation: dict[str, Any]) -> None:
    refs = [{"$ref": _REF.format(model=model.__name__)} for model in TAKES[path]]
    operation["requestBody"] = {"required": True, "content": _json({"anyOf": refs})}
    content = _json(GIVES[path])
    if path in STREAMS:
        content["text/event-stream"] = {"schema": _EVENT}
    operation["responses"]["200"]["content"] = content


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
