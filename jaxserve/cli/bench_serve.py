"""``jaxserve bench serve``: latencies and throughput of a server under load."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from jaxserve.cli import bench_engine, complete_client
from jaxserve.cli.complete_client import Client, ServerError
from jaxserve.cli.flags import Parser, UsageError, server_extra
from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from jaxserve.bench.workload import Item

HELP = "time to first token, between tokens and in all, of a server under load"
INPUT_LEN, OUTPUT_LEN = 1024, 128
METRICS = ("ttft", "tpot", "itl", "e2el")
VOCABULARY = 256
"""Random ids stay below this; every vocabulary has so many, and a server's speed can't tell."""
START_SECONDS = 600


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve bench serve [options]",
        description="Sends requests to a server that speaks OpenAI's protocol, as vllm bench serve "
        "does. Example: jaxserve bench serve --start-server='' --num-prompts 100 --request-rate 4",
    )
    add = parser.add_argument
    complete_client.add_flags(parser)
    text = "start jaxserve serve with this MODEL and flags, in quotes, and stop it afterwards"
    add("--start-server", type=str, metavar="FLAGS", help=text)
    text = "/v1/completions or /v1/chat/completions"
    add("--endpoint", type=str, default="/v1/completions", metavar="PATH", help=text)
    _add_load(parser)
    text = 'of the table, "ttft,tpot,itl,e2el" or some of them'
    add("--percentile-metrics", type=str, default=",".join(METRICS), metavar="NAMES", help=text)
    add("--metric-percentiles", type=str, default="90,99", metavar="X,...", help="of each metric")
    text = "metric:ms, as ttft:200; requests within all limits count; may be repeated"
    add("--goodput", action="append", type=str, metavar="LIMIT", help=text)
    add("--save-result", action="store_true", help="write the results to a JSON file")
    add("--save-detailed", action="store_true", help="the same with each request's times")
    text = "[default: rate, name and time]; implies --save-result"
    add("--result-filename", type=str, metavar="FILE", help=text)
    add("--result-dir", type=str, default=".", metavar="DIR", help="where that file goes")
    add("--disable-tqdm", action="store_true", help="show no bar")
    return parser


def _add_load(parser: Parser) -> None:
    group = parser.add_argument_group("load")
    add = group.add_argument
    add("--num-prompts", type=int, default=1000, metavar="N", help="requests")
    text = "requests per second; inf sends all at once"
    add("--request-rate", type=float, default=float("inf"), metavar="X", help=text)
    text = "1 is a Poisson process, less comes in bursts, more is steadier"
    add("--burstiness", type=float, default=1.0, metavar="X", help=text)
    add("--max-concurrency", type=int, metavar="N", help="most requests on the way")
    add("--num-warmups", type=int, default=1, metavar="N", help="requests that don't count")
    text = "random token ids, or sharegpt: conversations of --dataset-path"
    names = ("random", "sharegpt")
    add("--dataset-name", choices=names, default="random", metavar="NAME", help=text)
    add("--dataset-path", type=str, metavar="FILE", help="JSON in ShareGPT's format")
    text = f"tokens of a random prompt [default: {INPUT_LEN}, or what fits]"
    add("--random-input-len", type=int, metavar="N", help=text)
    text = f"tokens to generate for it [default: {OUTPUT_LEN}, or what fits]"
    add("--random-output-len", type=int, metavar="N", help=text)
    text = "draw lengths evenly from len * (1 - ratio) to len * (1 + ratio)"
    add("--random-range-ratio", type=float, default=0.0, metavar="X", help=text)
    text = "tokens to generate instead of ShareGPT's answers"
    add("--sharegpt-output-len", type=int, metavar="N", help=text)
    add("--temperature", type=float, default=0.0, metavar="X", help="of sampling; 0 is greedy")
    text = "generate all tokens that were asked for; on for random prompts"
    add("--ignore-eos", action="store_true", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals")


def run(args: Namespace) -> int:
    """Measures and prints; 1 if a request failed."""
    metrics, percentiles, goodput = _check(args)
    with server_extra():
        from jaxserve.bench import serving

    with _server(args) as client:
        target, rng = _target(args, client), random.Random(args.seed)
        items = _items(args, client, rng)
        prompts = _texts(client, items) if "/chat/" in args.endpoint else None
        times = serving.arrivals(len(items), args.request_rate, args.burstiness, rng)

        async def measure() -> tuple[list[serving.Outcome], float]:
            warm = args.num_warmups
            some = None if prompts is None else prompts[:warm]
            tried, _ = await serving.drive(target, items[:warm], [0.0] * warm, some, 1)
            for outcome in tried:
                if outcome.error:
                    raise ServerError(f"the first request failed: {outcome.error}")
            bar = bench_engine.show_progress() and not args.disable_tqdm
            return await serving.drive(target, items, times, prompts, args.max_concurrency, bar)

        outcomes, seconds = asyncio.run(measure())
    results = serving.summarize(outcomes, seconds, percentiles, goodput)
    print(serving.text(results, metrics, percentiles))
    for error in list(dict.fromkeys(o.error for o in outcomes if o.error))[:3]:
        print(f"failed: {error}", file=sys.stderr)
    _save(args, target.model, results, serving.details(outcomes) if args.save_detailed else {})
    return 1 if results["failed"] else 0


def _check(args: Namespace) -> tuple[list[str], list[float], dict[str, float]]:
    """(metrics, percentiles, goodput's limits) of the flags."""
    lengths = ("random_input_len", "random_output_len", "sharegpt_output_len")
    bench_engine.check_positive(args, "num_prompts", "max_concurrency", *lengths)
    if args.num_warmups < 0:
        raise UsageError("--num-warmups must not be negative.")
    if not (args.request_rate > 0 and args.burstiness > 0):
        raise UsageError("--request-rate and --burstiness must be positive.")
    if not 0 <= args.random_range_ratio < 1:
        raise UsageError("--random-range-ratio must be at least 0 and below 1.")
    if (args.dataset_name == "sharegpt") != (args.dataset_path is not None):
        raise UsageError("--dataset-name sharegpt and --dataset-path FILE go together.")
    if args.start_server is not None and args.url is not None:
        raise UsageError("give either --url or --start-server.")
    metrics = args.percentile_metrics.split(",")
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"--percentile-metrics takes {', '.join(METRICS)}, got {name!r}.")
    goodput = {}
    for limit in args.goodput or ():
        name, _, value = limit.partition(":")
        number = _number(value)
        if name not in METRICS or number is None:
            raise UsageError(f"--goodput must be like ttft:200, got {limit!r}.")
        goodput[name] = number
    percentiles = [_number(word) for word in args.metric_percentiles.split(",")]
    known = [number for number in percentiles if number is not None and number <= 100]
    if len(known) < len(percentiles):
        raise UsageError(f"--metric-percentiles {args.metric_percentiles!r} must be like 50,99.")
    return metrics, known, goodput


def _number(word: str) -> float | None:
    """A number that isn't negative."""
    try:
        number = float(word)
    except ValueError:
        return None
    return number if number >= 0 else None


def _target(args: Namespace, client: Client) -> Any:
    from jaxserve.bench.serving import Target

    body: dict[str, Any] = {"temperature": args.temperature}
    if args.ignore_eos or args.dataset_name == "random":
        body["ignore_eos"] = True
    model = args.model_name or client.models()[0]["id"]
    return Target(client.url + args.endpoint, model, client.headers, body)


def _items(args: Namespace, client: Client, rng: random.Random) -> list[Item]:
    from jaxserve.bench.workload import random_items, random_lengths, sharegpt_items

    if args.dataset_name == "sharegpt":
        lengths = args.sharegpt_output_len
        return sharegpt_items(args.dataset_path, args.num_prompts, _encoder(client), rng, lengths)
    room = client.models()[0].get("max_model_len") or INPUT_LEN + OUTPUT_LEN
    outputs = args.random_output_len or max(1, min(OUTPUT_LEN, room // 4))
    # The chat route's template adds tokens of its own.
    template = 64 if "/chat/" in args.endpoint else 0
    inputs = args.random_input_len or max(1, min(INPUT_LEN, room - outputs - template))
    pairs = random_lengths(args.num_prompts, inputs, outputs, args.random_range_ratio, rng)
    return random_items(pairs, VOCABULARY, rng)


def _encoder(client: Client) -> Any:
    return lambda text: client.post("/tokenize", {"prompt": text})["tokens"]


def _texts(client: Client, items: list[Item]) -> list[str]:
    return [client.post("/detokenize", {"tokens": item.prompt})["prompt"] for item in items]


@contextlib.contextmanager
def _server(args: Namespace) -> Iterator[Client]:
    """The server that is asked; one that is started here is stopped afterwards."""
    if args.start_server is None:
        yield Client(args.url, args.api_key)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [*shlex.split(args.start_server), "--host", "127.0.0.1", "--port", port]
    environ = {n: v for n, v in os.environ.items() if n not in ("JAXSERVE_PORT", "JAXSERVE_HOST")}
    command = [sys.executable, "-m", "jaxserve", "serve", *words]
    # Its log stays visible; where it can be found is no part of the results.
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    try:
        client = Client(f"http://127.0.0.1:{port}", args.api_key)
        _wait(process, client)
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], client: Client) -> None:
    """Waits until the server takes requests."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise JaxserveError(f"the server ended with code {process.returncode}")
        if client.ready():
            return
        time.sleep(0.2)
    raise JaxserveError(f"the server was not ready within {START_SECONDS} s")


def _save(
    args: Namespace, model: str, results: dict[str, Any], details: dict[str, list[Any]]
) -> None:
    if not (args.save_result or args.save_detailed or args.result_filename):
        return
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    rate = args.request_rate
    setting = {
        "date": now,
        "endpoint_type": "openai-chat" if "/chat/" in args.endpoint else "openai",
        "model_id": model,
        "num_prompts": args.num_prompts,
        "request_rate": "inf" if rate == float("inf") else rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }
    name = f"openai-{rate:g}qps-{model.replace('/', '-')}-{now}.json"
    path = Path(args.result_dir) / (args.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(setting | results | details, indent=2) + "\n", encoding="utf-8")
    print(path)
