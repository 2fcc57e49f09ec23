"""Shapes and distributions that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.workload import Cost, normal


@dataclass(frozen=True)
class Case:
    """Logits of one kind, and the settings of their lanes; each lane gets the next of those given.

    Attributes:
        kind: "normal"; "peaked", some far above the rest as models give; "flat"; "bfloat16", normal
            but with 8 bits, so that many tie; "sparse", most of them -inf; "extreme", of all
            magnitudes that float32 has.
    """

    name: str
    lanes: int = 8
    vocab: int = 999
    kind: str = "normal"
    min_p: tuple[float, ...] = (0.0,)
    top_k: tuple[int, ...] = (0,)
    top_p: tuple[float, ...] = (1.0,)


ALMOST_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
KINDS = ("normal", "peaked", "flat", "bfloat16", "sparse", "extreme")

CASES = (
    Case("nothing asked for"),
    *(Case(f"top-k, {kind}", kind=kind, top_k=(1, 2, 7, 50, 300, 998)) for kind in KINDS),
    *(Case(f"top-p, {kind}", kind=kind, top_p=(0.1, 0.5, 0.9, 0.99)) for kind in KINDS),
    *(Case(f"min-p, {kind}", kind=kind, min_p=(1e-30, 0.01, 0.5, 1.0)) for kind in KINDS),
    Case("top-k that keeps all", top_k=(-1, 999, 1000, 2**31 - 1)),
    Case("tiny and nearly full top-p", top_p=(1e-45, 1e-38, 0.0, 1e-6, ALMOST_ONE)),
    Case("all three", min_p=(0.0, 0.02, 0.2), top_k=(0, 8, 40, 1, 500), top_p=(0.8, 1.0)),
    Case(
        "all three, ties",
        kind="bfloat16",
        min_p=(0.02, 0.0),
        top_k=(8, 9, 70),
        top_p=(0.7, 0.95),
    ),
    Case("tiny vocabulary", vocab=3, top_k=(1, 2), top_p=(0.5, 1.0, 0.9)),
    Case(
        "one lane, GPT-2's vocabulary",
        lanes=1,
        vocab=50257,
        kind="peaked",
        top_k=(50,),
        top_p=(0.9,),
    ),
    Case(
        "Qwen's vocabulary", lanes=2, vocab=151936, kind="peaked", top_k=(50, 0), top_p=(0.9, 0.95)
    ),
    Case(
        "flat Llama 3 vocabulary",
        lanes=2,
        vocab=128256,
        kind="normal",
        top_k=(0, 3000),
        top_p=(0.9,),
    ),
)

WIDENS = False
"""The reference works on the bits of float32."""
FRESH = ("logits",)
"""Arguments that differ between calls which otherwise are equal."""

BENCHMARKS = tuple(
    Case(f"{name}, {lanes} x {vocab}", lanes, vocab, kind, top_k=top_k, top_p=top_p)
    for name, kind, top_k, top_p in (
        ("top-k and top-p", "peaked", (50,), (0.9,)),
        ("top-p, peaked", "peaked", (0,), (0.9,)),
        ("top-p, nearly flat", "normal", (0,), (0.9,)),
        ("nothing", "normal", (0,), (1.0,)),
    )
    for vocab in (32_000, 128_256)
    for lanes in (1, 64, 256)
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``truncation_threshold``."""
    rng = np.random.default_rng(seed)
    shape = case.lanes, case.vocab
    logits = np.array(normal(rng, shape, "float32"))
    if case.kind == "peaked":
        logits = 2 * logits + 12 * rng.random(shape, np.float32) ** 40
    elif case.kind == "flat":
        logits = 1e-3 * logits
    elif case.kind == "bfloat16":
        logits = np.asarray(jnp.asarray(4 * logits, jnp.bfloat16), np.float32)
    elif case.kind == "sparse":
        logits[rng.random(shape) < 0.9] = -np.inf
        logits[:, 0] = 0.0
    elif case.kind == "extreme":
        logits *= 10.0 ** rng.uniform(-44, 37, shape).astype(np.float32)

    def setting(values: tuple[float, ...], dtype: Any) -> Any:
        return jnp.asarray(np.resize(np.asarray(values, dtype), case.lanes))

    return {
        "logits": jnp.asarray(logits),
        "min_p": setting(case.min_p, np.float32),
        "top_k": setting(case.top_k, np.int32),
        "top_p": setting(case.top_p, np.float32),
    }


def cost(case: Case) -> Cost:
    """All logits are read once, if the lanes ask for something, and their masses are summed."""
    asks = case != replace(case, min_p=(0.0,), top_k=(0,), top_p=(1.0,))
    count = case.lanes * case.vocab * asks
    return Cost(4.0 * count, 2.0 * count)


def tolerance(case: Case) -> float:
    """A top-p's threshold may lie a token higher or lower, as float32 rounds the mass."""
    return 1e-4


def promised(case: Case, output: jax.Array) -> jax.Array:
    """The thresholds, with a number for lanes that keep everything."""
    return jnp.where(jnp.isneginf(output), 0, output)
