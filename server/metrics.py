"""Prometheus metrics: vLLM's series with the prefix ``jaxserve:``, and some of our own.

What the front-end sees (latencies, counts of requests) is counted here; what the engine knows is
fetched from it for every scrape. With several front-ends, each shows its own requests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from server.histogram import Histogram

PREFIX = "jaxserve:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
E2E_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKEN_BUCKETS = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5))
N_BUCKETS = (1, 2, 5, 10, 20)
LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
ENGINE_COUNTERS = {
    "num_preemptions": ("preemptions", "Requests that lost their pages."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted requests."),
    "generation_tokens": ("generation_tokens", "Tokens generated."),
    "prefix_cache_queries": ("prompt_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("cached_tokens", "Prompt tokens found there."),
    "engine_steps": ("steps", "Steps of the engine."),
    "scheduled_tokens": ("scheduled_tokens", "Tokens computed."),
    "padded_tokens": ("padded_tokens", "Places for tokens computed, padding included."),
}
"""Series name to (key in the engine's counters, description)."""


class Metrics:
    """The metrics of one front-end, in a registry of their own.

    Args:
        model_name: the label of every series.
    """

    def __init__(self, model_name: str) -> None:
        self._labels = ("model_name", "engine")
        self._values = (model_name, "0")
        self.registry = CollectorRegistry()
        tokens = TOKEN_BUCKETS
        histogram = self._histogram
        self.ttft = histogram("time_to_first_token_seconds", "Until the first token.", TTFT_BUCKETS)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens.", ITL_BUCKETS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Per request, after the first.", ITL_BUCKETS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "A whole generation.", E2E_BUCKETS)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens.", tokens)
        self.generation_tokens = histogram("request_generation_tokens", "Output tokens.", tokens)
        self.max_tokens = histogram("request_params_max_tokens", "Asked for at most.", tokens)
        self.n = histogram("request_params_n", "Completions per prompt.", N_BUCKETS)
        self.loop_lag = histogram(
            "event_loop_lag_seconds", "How late the event loop woke up.", LAG_BUCKETS
        )
        self.load = self._gauge("server_load", "Generating requests under way in this front-end.")
        self.streams = self._gauge("open_streams", "Replies being streamed.")
        # To look a series up by its labels takes longer than to count in it.
        success = self._counter("request_success", "Ended generations.", "finished_reason")
        self._success = functools.cache(lambda *labels: success.labels(*self._values, *labels))
        http = self._counter("http_requests", "Replies.", "route", "method", "status")
        self._http = functools.cache(lambda *labels: http.labels(*self._values, *labels))

    def request_finished(self, reason: str) -> None:
        """Counts a generation that ended; "abort" is one whose client left."""
        self._success(reason).inc()

    def replied(self, route: str, method: str, status: int) -> None:
        """Counts a reply. ``route`` is a pattern of the route table, so the series stay few."""
        known = method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS") else "other"
        self._http(route, known, str(status)).inc()

    def render(self, engine: Mapping[str, Any] | None) -> bytes:
        """The text that Prometheus reads.

        Args:
            engine: its counters (``EngineClient.stats``); None if it can't be reached.
        """
        registry = CollectorRegistry()
        registry.register(_Families(self._labels, self._values, engine))
        return generate_latest(self.registry) + generate_latest(registry)

    def _histogram(self, name: str, doc: str, buckets: tuple[float, ...]) -> Histogram:
        labels = dict(zip(self._labels, self._values))
        histogram = Histogram(PREFIX + name, doc, labels, buckets)
        self.registry.register(histogram)
        return histogram

    def _gauge(self, name: str, doc: str) -> Gauge:
        return Gauge(PREFIX + name, doc, self._labels, registry=self.registry).labels(*self._values)

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, doc, (*self._labels, *labels), registry=self.registry)


class _Families:
    """The engine's counters as series."""

    def __init__(
        self, labels: tuple[str, ...], values: tuple[str, ...], engine: Mapping[str, Any] | None
    ) -> None:
        self._labels, self._values, self._engine = labels, values, engine

    def collect(self) -> Iterator[Metric]:
        """Asked by prometheus_client."""
        yield self._gauge("engine_up", "1 if the engine answered.", float(self._engine is not None))
        if self._engine is None:
            return
        stats = self._engine
        for name, (key, doc) in ENGINE_COUNTERS.items():
            family = CounterMetricFamily(PREFIX + name, doc, labels=self._labels)
            family.add_metric(self._values, stats[key])
            yield family
        yield self._gauge("num_requests_running", "Requests that have pages.", stats["running"])
        yield self._gauge("num_requests_waiting", "Requests that wait.", stats["waiting"])
        used, total = stats["kv_pages_used"], stats["kv_pages_total"]
        yield self._gauge("kv_cache_usage_perc", "KV pages in use, 1 is all.", used / max(total, 1))
        yield self._gauge("kv_pages_used", "KV pages in use.", used)
        yield self._gauge("kv_pages_total", "KV pages.", total)
        padding, waste = stats["padding_waste"], stats["kv_waste"]
        yield self._gauge("padding_waste_ratio", "Computed places without a token.", padding)
        yield self._gauge("kv_waste_ratio", "KV slots of requests without a token.", waste)
        compilations = CounterMetricFamily(
            PREFIX + "compilations", "Programs compiled.", labels=(*self._labels, "phase")
        )
        for phase, count in stats["compilations"].items():
            compilations.add_metric((*self._values, phase), count)
        yield compilations

    def _gauge(self, name: str, doc: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, doc, labels=self._labels)
        family.add_metric(self._values, value)
        return family
