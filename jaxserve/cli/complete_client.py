"""A client of a running server, for commands on the terminal. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from typing import Any

from jaxserve.cli.flags import Parser
from jaxserve.errors import JaxserveError

URL = "http://127.0.0.1:8000"
CUT_OFF = "the server closed the connection before the answer's end"


class ServerError(JaxserveError):
    """The server can't be reached, or refused the request."""


URL_HELP = f"of the server, with or without /v1 [default: OPENAI_BASE_URL, or {URL}]"


def add_flags(parser: Parser, url_help: str = URL_HELP) -> None:
    """Where the server is."""
    parser.add_argument("--url", type=str, metavar="URL", help=url_help)
    text = "of the server [default: OPENAI_API_KEY]"
    parser.add_argument("--api-key", type=str, metavar="KEY", help=text)
    text = "name of the model [default: the server's first]"
    parser.add_argument("--model-name", type=str, metavar="NAME", help=text)


class Client:
    """Speaks to one server.

    Args:
        url: of the server, with or without /v1; None takes OPENAI_BASE_URL, then ``URL``.
        api_key: None takes OPENAI_API_KEY.
        timeout_s: longest silence of the server.

    Attributes:
        url: of the server, without /v1.
        headers: that show the key.
    """

    def __init__(self, url: str | None, api_key: str | None, timeout_s: float = 600.0) -> None:
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or URL).rstrip("/").removesuffix("/v1")
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s

    def models(self) -> list[dict[str, Any]]:
        """The cards of the models that the server has."""
        with self._open("/v1/models", None) as reply:
            try:
                cards: list[dict[str, Any]] = json.load(reply)["data"]
            except (ValueError, KeyError, TypeError):
                raise ServerError(f"what answers at {self.url} lists no models") from None
        return cards

    def model(self, name: str | None) -> dict[str, Any]:
        """The card of a model, by default the first one's. A name that the server doesn't list
        gets a card of its name only, because not all servers list all.

        Raises:
            ServerError: the server can't be reached, or has no models.
        """
        cards = self.models()
        if name is not None:
            return next((card for card in cards if card["id"] == name), {"id": name})
        if not cards:
            raise ServerError(f"the server at {self.url} has no models")
        return cards[0]

    def ready(self) -> bool:
        """Whether the server takes requests."""
        try:
            with self._open("/ready", None):
                return True
        except ServerError:
            return False

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a request.

        Raises:
            ServerError: the server can't be reached, or refuses the request.
        """
        with self._open(path, body) as reply:
            return json.load(reply)

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Posts a request and gives the chunks of the answer as they come.

        Raises:
            ServerError: the server can't be reached, refuses the request or fails on the way.
        """
        with self._open(path, body | {"stream": True}) as reply:
            for line in _lines(reply):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ServerError(f"the server reports: {chunk['error'].get('message')}")
                yield chunk
        raise ServerError(CUT_OFF)

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", **self.headers}
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            return urllib.request.urlopen(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{error.code} from {self.url}: {_message(error)}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(
                f"no server answers at {self.url} ({reason}); `jaxserve serve` starts one"
            ) from None


def _lines(reply: Any) -> Iterator[bytes]:
    """The lines of a reply while they come."""
    try:
        yield from reply
    except TimeoutError:
        raise ServerError("the server went silent in the middle of the answer") from None
    except (OSError, http.client.HTTPException):
        raise ServerError(CUT_OFF) from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
