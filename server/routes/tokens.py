"""POST /tokenize and POST /detokenize."""

from __future__ import annotations

from aiohttp import web

from server.body import json_object
from server.protocol.tokens import parse_detokenize, parse_tokenize
from server.replies import json_response
from server.service import SERVICE


async def tokenize(request: web.Request) -> web.Response:
    """The token ids of a prompt or of a conversation."""
    service = request.app[SERVICE]
    wanted = parse_tokenize(await json_object(request, service.config), service.config)
    service.model(wanted.model)
    most = service.info().max_model_len
    if wanted.conversation is not None:
        ids = await service.texts.render(wanted.conversation, most)
    else:
        prompt = wanted.prompt or ""
        special = wanted.add_special_tokens
        (ids,) = await service.texts.encode([prompt], special, most, "prompt")
    reply = {"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": None}
    if wanted.return_token_strs:
        reply["token_strs"] = await service.texts.show(ids)
    return json_response(reply)


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids."""
    service = request.app[SERVICE]
    model, ids = parse_detokenize(await json_object(request, service.config))
    service.model(model)
    service.info().limits.check_token_ids("tokens", ids)
    return json_response({"prompt": await service.texts.decode(ids, "tokens")})
