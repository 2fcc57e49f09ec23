"""Our histogram says what prometheus_client's does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as Reference

from server.histogram import Histogram

BOUNDS = (0.01, 0.5, 1.0, 20.0)
VALUES = st.sampled_from((0.0, *BOUNDS, 0.011, 3.0, 1e6))


@given(values=st.lists(st.tuples(VALUES, st.integers(1, 3))))
def test_it_is_written_like_prometheus_clients(values: list[tuple[float, int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("a:b", "What it is.", {"model": "m", "engine": "0"}, BOUNDS)
    ours.register(histogram)
    metric = Reference("a:b", "What it is.", ("model", "engine"), registry=theirs, buckets=BOUNDS)
    reference = metric.labels("m", "0")
    for value, times in values:
        histogram.observe(value, times)
        for _ in range(times):
            reference.observe(value)
    assert samples(ours) == pytest.approx(samples(theirs))


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """The series as written, without the time of creation."""
    lines = generate_latest(registry).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "_created" not in name}
