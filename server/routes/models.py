"""GET /v1/models and GET /v1/models/{model}."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from server.errors import model_not_found
from server.replies import json_response
from server.service import SERVICE, Service


async def list_models(request: web.Request) -> web.Response:
    """All names of the model; answered while it loads, too."""
    service = request.app[SERVICE]
    return json_response({"object": "list", "data": [_card(service, n) for n in service.names]})


async def get_model(request: web.Request) -> web.Response:
    """The model, by one of its names."""
    service, name = request.app[SERVICE], request.match_info["model"]
    if name not in service.names:
        raise model_not_found(name)
    return json_response(_card(service, name))


def _card(service: Service, name: str) -> dict[str, Any]:
    info = service.engine.info
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "jaxserve",
        "root": service.names[0],
        "parent": None,
        "max_model_len": info and info.max_model_len,
        "permission": [],
    }
