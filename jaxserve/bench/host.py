"""The host's part of a step, without a device: scheduling, packing, and taking in the results.

    python -m jaxserve.bench.host [--rows 1 64 256] [--waiting 0 10000] [--rounds 5]

Real scheduler, buckets, layouts and packer; the tokens are made up. Prints microseconds per step,
the best of some rounds of steps in which every row decodes, for prefix caching off and on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter, deque

from jaxserve.config import DeviceFacts, EngineConfig
from jaxserve.engine.batch import Layout, Packer
from jaxserve.engine.decision import Decision, StepResult
from jaxserve.engine.page_allocator import PageAllocator
from jaxserve.engine.request import Request
from jaxserve.engine.runner import make_buckets, step_sizes
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.stats import Stats
from jaxserve.sampling.params import SamplingParams

PARTS = ("schedule", "pack", "update")
RUN_AHEAD, PAGE_SIZE, MAX_MODEL_LEN = 2, 16, 4096
STEPS = 10 * PAGE_SIZE  # per round: each request takes ten new pages
TOKEN, STOP_TOKEN = 7, 2


def main() -> None:
    """Measures each combination and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 10_000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("microseconds per step\n")
    print("".join(f"{name:>10}" for name in ("rows", "waiting", "caching", *PARTS, "total")))
    for rows, waiting, caching in itertools.product(options.rows, options.waiting, (False, True)):
        parts = measure(rows, waiting, caching, options.rounds)
        numbers = [*(parts[name] for name in PARTS), parts.total()]
        cells = "".join(f"{1e6 * seconds:10.0f}" for seconds in numbers)
        print(f"{rows:10}{waiting:10}{'on' if caching else 'off':>10}{cells}")


def measure(rows: int, waiting: int, caching: bool, rounds: int) -> Counter[str]:
    """Seconds per step of each part, with ``rows`` requests that decode and ``waiting`` others."""
    facts = DeviceFacts("gpu", 1)
    config = EngineConfig(max_num_seqs=rows).resolve(facts, MAX_MODEL_LEN)
    buckets = make_buckets(config, facts.platform)
    layouts = {
        bucket: Layout.make(bucket, PAGE_SIZE, rows, group=4, split=True) for bucket in buckets
    }
    allocator = PageAllocator(1 + rows * MAX_MODEL_LEN // PAGE_SIZE, PAGE_SIZE, caching)
    max_tokens, sizes = config.max_num_batched_tokens, step_sizes(buckets)
    scheduler = Scheduler(allocator, rows, max_tokens, Stats(), sizes)
    packer = Packer(rows)
    params = SamplingParams(temperature=0)
    for index in range(rows + waiting):
        prompt = list(range(index, index + 100 + index % 300))
        request = Request(str(index), prompt, params, MAX_MODEL_LEN - 400, frozenset([STOP_TOKEN]))
        scheduler.add(request)
    in_flight: deque[Decision] = deque()

    def step() -> Counter[str]:
        times = [time.perf_counter()]
        decision = scheduler.schedule()
        times.append(time.perf_counter())
        packer.enter_new_rows(decision)
        packer.variant(decision)
        size = decision.num_lanes, decision.num_tokens
        layout = next(layout for bucket, layout in layouts.items() if bucket.fits(*size))
        packer.pack(layout, decision, decision.table_updates[: layout.num_table_updates])
        times.append(time.perf_counter())
        in_flight.append(decision)
        if len(in_flight) > RUN_AHEAD:
            done = in_flight.popleft()
            scheduler.update(done, StepResult([TOKEN] * done.num_lanes))
        times.append(time.perf_counter())
        return Counter({name: times[i + 1] - times[i] for i, name in enumerate(PARTS)})

    while scheduler.running.columns.num_schedulable_tokens().sum() != rows:
        step()  # the prompts
    totals = [sum((step() for _ in range(STEPS)), Counter[str]()) for _ in range(rounds)]
    best = min(totals, key=Counter.total)
    return Counter({name: seconds / STEPS for name, seconds in best.items()})


if __name__ == "__main__":
    main()
