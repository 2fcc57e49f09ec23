"""Who may use what: API keys, pages of other origins, and the ids of requests."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from server.app import create_app
from server.auth import OPEN_ROUTES, Keys
from server.config import ServerConfig
from tests.helpers.fake_engine_client import FakeEngineClient
from tests.helpers.serving import demo_tokenizer, front_end, story

KEY = "sk-good-key"
ENDLESS = {"prompt": "Hi", "max_tokens": 2000, "temperature": 0}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def slow_engine(**options: Any) -> FakeEngineClient:
    return FakeEngineClient(list(story()), step_s=0.005, **options)


def routes(config: ServerConfig) -> list[tuple[str, str]]:
    """(method, pattern) of the whole route table."""
    app = create_app(config, slow_engine(), demo_tokenizer(), ["demo"])
    return [(r.method, r.resource.canonical) for r in app.router.routes() if r.resource]


def test_every_route_but_the_open_ones_wants_a_key() -> None:
    async def main() -> None:
        async with front_end(api_keys=(KEY, "other")) as front:
            guarded = 0
            for method, path in routes(ServerConfig()):
                is_open = path in OPEN_ROUTES or path == "/" or path.startswith("/web/")
                concrete = path.replace("{model}", "demo")
                status, reply, headers = await front.request(method, concrete)
                assert (status != 401) == is_open, (method, path, status)
                if method != "HEAD" and not is_open:
                    guarded += 1
                    assert reply["error"]["code"] == "invalid_api_key"
                    assert headers["WWW-Authenticate"] == "Bearer"
                    again, _, _ = await front.request(method, concrete, headers=bearer(KEY))
                    assert again != 401
            assert guarded >= 9

    asyncio.run(main())


@pytest.mark.parametrize(
    "header",
    (
        *("", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", f"Bearer\t{KEY}", KEY),
        *(f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY} x", f"Bearer  {KEY}"),
        *("Bearer " + "x" * 8000, "Bearer " + "x" * 2**20, "Bearer kéy"),
    ),
)
def test_what_is_no_key_opens_nothing(header: str) -> None:
    async def main() -> None:
        async with front_end(api_keys=(KEY,)) as front:
            headers = {"Authorization": header}
            status, reply, _ = await front.request("GET", "/v1/models", headers=headers)
            assert status in (400, 401), status  # 400 if the head as a whole is too large
            assert KEY not in str(reply)

    asyncio.run(main())


def test_no_spelling_of_a_path_gets_around_the_keys() -> None:
    async def main() -> None:
        async with front_end(api_keys=(KEY,)) as front:
            targets = ("/%76%31/models", "//v1/models", "/v1/../v1/models", "/health/../v1/models")
            heads = ("Host: a/?x=", "Host: x\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b")
            for target in (
                *targets,
                "/v1/../metrics/../v1/models",
                "/V1/models",
                f"http://x:{front.port}/v1/models",
            ):
                for head in heads:
                    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
                    text = f"GET {target} HTTP/1.1\r\n{head}\r\nConnection: close\r\n\r\n"
                    writer.write(text.encode())
                    line = (await reader.readline()).decode()
                    assert line.split()[1] in ("400", "401", "404"), (target, line)
                    writer.close()

    asyncio.run(main())


def test_keys_are_compared_whole() -> None:
    keys = Keys(["a", "bc"])
    assert "a" in keys and "bc" in keys
    assert not [key for key in ("", "b", "c", "abc", "\udcff", "A") if key in keys]


def test_neither_keys_nor_paths_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with front_end(api_keys=(KEY,), access_log=True) as front:
            await front.get(f"/secret-{KEY}?key={KEY}", headers=bearer(KEY))
            await front.get("/v1/models/demo", headers=bearer(KEY))
            _, text = await front.get("/metrics")
            assert KEY not in text

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert KEY not in caplog.text and "secret" not in caplog.text
    assert "unmatched 404" in caplog.text and "/v1/models/{model} 200" in caplog.text


def test_request_ids_are_echoed_if_they_are_harmless() -> None:
    async def main() -> None:
        async with front_end() as front:

            async def id_of(given: str) -> str:
                headers = {"X-Request-Id": given}
                return (await front.request("GET", "/health", headers=headers))[2]["X-Request-Id"]

            assert await id_of("trace-1.2:3") == "trace-1.2:3"
            for given in ("", "a b", "x" * 1000, "a\tb", "<b>"):
                assert await id_of(given) != given
            body, headers = {**ENDLESS, "max_tokens": 5}, {"X-Request-Id": "same"}
            replies = await asyncio.gather(
                *(front.post("/v1/completions", body, headers=headers) for _ in range(4))
            )
            assert len({reply["id"] for _, reply in replies}) == 4

    asyncio.run(main())


def test_pages_of_allowed_origins_may_call() -> None:
    async def main() -> None:
        settings: Any = {"api_keys": (KEY,), "allowed_origins": ("https://a.example",)}
        async with front_end(**settings) as front:
            asks = {"Access-Control-Request-Method": "POST"}
            for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
                headers = {"Origin": origin, **asks}
                status, _, answer = await front.request("OPTIONS", "/v1/models", headers=headers)
                assert (status == 204) == allowed
                assert (answer.get("Access-Control-Allow-Origin") == origin) == allowed
                headers = {"Origin": origin, **bearer(KEY)}
                _, _, answer = await front.request("GET", "/v1/models", headers=headers)
                assert (answer.get("Access-Control-Allow-Origin") == origin) == allowed

    asyncio.run(main())


def test_without_cors_no_reply_is_marked() -> None:
    async def main() -> None:
        async with front_end() as front:
            headers = {"Origin": "https://a.example"}
            _, _, answer = await front.request("GET", "/health", headers=headers)
            assert not [name for name in answer if name.startswith("Access-Control")]

    asyncio.run(main())
