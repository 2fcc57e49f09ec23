"""Counters of one engine, as plain numbers; whoever shows them gives them names and units."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Stats:
    """Totals since the engine started.

    Attributes:
        steps: steps dispatched.
        scheduled_tokens, padded_tokens: tokens computed, and places in the buckets that held them.
        prompt_tokens, cached_tokens: of admitted requests, and those found in the prefix cache.
        generation_tokens: tokens given to requests.
        kv_slots, kv_tokens: slots in the pages of running requests, and those that hold a token,
            summed over steps.
        preemptions: how often a request lost its pages.
        recoveries: failed steps after which everything was computed anew.
        finished: requests by finish reason.
        compilations: programs compiled, by "warmup" and "late" (after it).
        waiting_for_programs: callers that wait for a program to be compiled, now.
    """

    steps: int = 0
    scheduled_tokens: int = 0
    padded_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    kv_slots: int = 0
    kv_tokens: int = 0
    preemptions: int = 0
    recoveries: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    compilations: dict[str, int] = field(default_factory=dict)
    waiting_for_programs: int = 0

    @property
    def padding_waste(self) -> float:
        """Share of the computed token places that held no token."""
        return 1 - self.scheduled_tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def kv_waste(self) -> float:
        """Share of the KV slots given to requests that held no token, on average over steps."""
        return 1 - self.kv_tokens / self.kv_slots if self.kv_slots else 0.0
