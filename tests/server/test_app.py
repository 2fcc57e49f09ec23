"""What machines ask: health, metrics, documentation."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

from aiohttp import web
from openapi_spec_validator import validate

from server.engine_client import Startup
from server.protocol.json_body import MAX_DEPTH
from tests.helpers.serving import front_end

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = {"prompt": "Hi", "max_tokens": 2000, "temperature": 0}


def test_health_follows_the_engine() -> None:
    async def main() -> None:
        async with front_end() as front:
            engine = front.engine

            async def statuses() -> list[int]:
                paths = ("/health", "/ping", "/ready", "/startup")
                return [(await front.get(path))[0] for path in paths]

            assert await statuses() == [200, 200, 200, 200]
            engine.silent_s = 60
            assert await statuses() == [503, 503, 503, 200]
            engine.silent_s, engine.state = 0, "draining"
            assert await statuses() == [200, 200, 503, 200]
            engine.state = "dead"
            assert await statuses() == [503, 503, 503, 200]
            assert (await front.post("/v1/completions", ENDLESS))[0] == 503

    asyncio.run(main())


def test_a_start_under_way_is_told() -> None:
    async def main() -> None:
        async with front_end() as front:
            front.engine.state, front.engine.info = "starting", None
            front.engine.startup = Startup("weights", 3, 10, 7.5)
            stage = {"stage": "weights", "done": 3, "total": 10, "eta_s": 7.5}
            assert await front.get("/startup") == (200, stage)
            assert (await front.get("/v1/models"))[1]["data"][0]["id"] == "demo"
            status, reply, headers = await front.request("POST", "/v1/completions", ENDLESS)
            assert (status, reply["error"]["code"]) == (503, "starting")
            assert headers["Retry-After"] == "8"

    asyncio.run(main())


def test_metrics_bear_vllms_names() -> None:
    async def main() -> None:
        async with front_end() as front:
            await front.post("/v1/completions", {"prompt": "Hi", "max_tokens": 5, "temperature": 0})
            _, text, headers = await front.request("GET", "/metrics")
            assert headers["Content-Type"].startswith("text/plain")
            labels = '{engine="0",model_name="demo"}'
            for name, value in (
                *(("num_requests_running", "0.0"), ("num_requests_waiting", "0.0")),
                *(("kv_cache_usage_perc", "0.0"), ("num_preemptions_total", "2.0")),
                *(("prompt_tokens_total", "7.0"), ("generation_tokens_total", "3.0")),
                *(("time_to_first_token_seconds_count", "1.0"), ("engine_up", "1.0")),
                *(("inter_token_latency_seconds_count", "4.0"), ("server_load", "0.0")),
                *(("request_generation_tokens_sum", "5.0"), ("request_prompt_tokens_sum", "1.0")),
                *(("e2e_request_latency_seconds_count", "1.0"), ("padding_waste_ratio", "0.25")),
                *(("kv_waste_ratio", "0.5"), ("prefix_cache_hits_total", "3.0")),
                *(("request_params_n_count", "1.0"), ("open_streams", "0.0")),
            ):
                assert f"jaxserve:{name}{labels} {value}" in text, name
            assert 'jaxserve:compilations_total{engine="0",model_name="demo",phase="late"}' in text
            assert "jaxserve:event_loop_lag_seconds_bucket" in text
            assert 'finished_reason="length"' in text

    asyncio.run(main())


def test_metrics_do_not_grow_with_what_clients_send_and_outlive_the_engine() -> None:
    async def main() -> None:
        async with front_end() as front:
            for number in range(20):
                await front.request("GET", f"/nothing/{number}")
                await front.request(f"METHOD{number}", "/v1/models")
                await front.post("/v1/completions", {"prompt": "x", "model": f"m{number}"})
            front.engine.state = "dead"
            _, text = await front.get("/metrics")
            assert text.count("jaxserve:http_requests_total{") <= 4
            assert "jaxserve:engine_up" in text and "num_preemptions" not in text

    asyncio.run(main())


def test_openapi_describes_every_route() -> None:
    async def main() -> None:
        async with front_end(root_path="/llm") as front:
            status, document = await front.get("/openapi.json")
            assert status == 200
            validate(document)
            assert document["servers"] == [{"url": "/llm"}]
            assert {"/v1/chat/completions", "/generate", "/health"} <= set(document["paths"])
            fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
            assert {"prompt", "temperature", "top_k", "stream"} <= set(fields)
            status, page = await front.get("/docs")
            assert status == 200 and "max_completion_tokens" in page

    asyncio.run(main())


def test_documentation_can_be_switched_off() -> None:
    async def main() -> None:
        async with front_end(disable_fastapi_docs=True) as front:
            assert (await front.get("/docs"))[0] == (await front.get("/openapi.json"))[0] == 404

    asyncio.run(main())


def test_nested_bodies_have_a_limit() -> None:
    async def main() -> None:
        async with front_end() as front:
            for depth, status in ((MAX_DEPTH - 2, 200), (MAX_DEPTH + 2, 400)):
                value = b"[" * depth + b"]" * depth
                body = b'{"prompt":"x","max_tokens":1,"user":' + value + b"}"
                headers = {"Content-Type": "application/json"}
                assert (await front.post("/v1/completions", data=body, headers=headers))[
                    0
                ] == status

    asyncio.run(main())


def test_the_application_loads_no_jax() -> None:
    code = (
        "import asyncio, sys\n"
        "from tests.helpers.fake_engine_client import FakeEngineClient\n"
        "from tests.helpers.serving import front_end\n"
        "async def main():\n"
        "    async with front_end(FakeEngineClient([5, 6]), tokenizer=False) as front:\n"
        "        body = {'prompt': [7], 'max_tokens': 3}\n"
        "        assert (await front.post('/v1/completions', body))[0] == 200\n"
        "asyncio.run(main())\n"
        "print(sorted({'jax', 'jaxlib', 'flax'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_middleware_of_ones_own() -> None:
    async def main() -> None:
        async with front_end(middleware=("tests.server.test_app:gone",)) as front:
            assert (await front.get("/health"))[0] == 410

    asyncio.run(main())


@web.middleware
async def gone(request: web.Request, handler: Any) -> web.StreamResponse:
    raise web.HTTPGone
