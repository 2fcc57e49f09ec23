"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.workload import MIXTRAL_8X7B, QWEN3_30B_A3B, Cost, LayerShape, normal


@dataclass(frozen=True)
class Case:
    """Tokens that go through ``top_k`` of ``count`` experts each.

    Attributes:
        choice: "random": of all; "some": of the first ``top_k`` + 1, so that nobody chooses the
            others; "one": the last one, ``top_k`` times; "elsewhere": of four times as many, those
            of this device standing second.
        padding: so many of the tokens choose none, as in a step that doesn't fill its bucket.
    """

    name: str
    tokens: int = 5
    count: int = 8
    top_k: int = 2
    hidden: int = 64
    ffn: int = 96
    dtype: str = "float32"
    activation: str = "silu"
    biased: bool = False
    choice: Literal["random", "some", "one", "elsewhere"] = "random"
    padding: int = 0


CASES = (
    Case("plain"),
    Case("one token", tokens=1),
    Case("one expert each", top_k=1),
    Case("more pairs than experts", tokens=13),
    Case("experts nobody chose", tokens=17, choice="some"),
    Case("all on one", tokens=21, choice="one"),
    Case("experts elsewhere", tokens=11, choice="elsewhere"),
    Case("one token, experts elsewhere", tokens=1, top_k=4, choice="elsewhere"),
    Case("padding", tokens=8, padding=7),
    Case("odd sizes", tokens=9, count=5, top_k=3, hidden=72, ffn=40),
    Case("biases, clamped silu", biased=True, activation="clamped_silu"),
    Case("gelu_tanh", activation="gelu_tanh"),
    Case("bfloat16", hidden=128, ffn=256, dtype="bfloat16"),
    Case("float16, biases", hidden=128, ffn=128, dtype="float16", biased=True),
    Case("many tokens", tokens=300, top_k=3, dtype="bfloat16"),
    Case("many tokens, elsewhere, biases", tokens=300, choice="elsewhere", biased=True),
    Case("many tokens on one", tokens=270, choice="one"),
)

FRESH = ("x",)
"""Arguments that differ between calls which otherwise are equal."""


def of_layer(layer: LayerShape, name: str, tokens: int) -> Case:
    """Tokens through a model's experts."""
    return Case(
        name,
        tokens,
        layer.num_experts,
        layer.top_k,
        layer.hidden,
        layer.ffn,
        layer.dtype,
        layer.activation,
        layer.biased,
    )


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Steps that an implementation must pass before a model with such layers uses it."""
    if not layer.num_experts:
        return ()
    # More experts would take memory, in float64 too, and find no more.
    layer = replace(layer, num_experts=min(layer.num_experts, 2 * layer.top_k))
    few, many = of_layer(layer, "3 tokens", 3), of_layer(layer, "300 tokens", 300)
    return few, many, replace(few, name="3 tokens, elsewhere", choice="elsewhere")


MODELS = {"Mixtral": MIXTRAL_8X7B, "Qwen3 30B": QWEN3_30B_A3B}
BENCHMARKS = (
    *(
        of_layer(layer, f"{model}, {tokens} tokens", tokens)
        for model, layer in MODELS.items()
        for tokens in (1, 64, 256, 2048)
    ),
    *(  # the smallest step of an engine, with a single request
        replace(of_layer(layer, f"{model}, 1 of 8 tokens", 8), padding=7)
        for model, layer in MODELS.items()
    ),
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``expert_ffn``."""
    rng = np.random.default_rng(seed)
    count, size, hidden = case.count, case.ffn, case.hidden
    weights = rng.uniform(0.1, 1, (case.tokens, case.top_k)).astype(np.float32)
    up = normal(rng, (count, 2, size, hidden), case.dtype) * hidden**-0.5
    down = normal(rng, (count, hidden, size), case.dtype) * size**-0.5
    biases = {}
    if case.biased:
        biases["up_bias"] = normal(rng, (count, 2, size), case.dtype)
        biases["down_bias"] = normal(rng, (count, hidden), case.dtype)
    return {
        "x": normal(rng, (case.tokens, hidden), case.dtype),
        "experts": jnp.asarray(_chosen(case, rng), jnp.int32),
        "weights": jnp.asarray(weights),
        "up": up,
        "down": down,
        **biases,
        "activation": case.activation,
    }


def _chosen(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Numbers of experts [tokens, top_k]."""
    real = np.arange(case.tokens)[:, None] < case.tokens - case.padding
    if case.choice == "one":
        return np.where(real, np.full((case.tokens, case.top_k), case.count - 1), -1)
    count = {"random": case.count, "some": case.top_k + 1, "elsewhere": 4 * case.count}
    order = rng.random((case.tokens, count[case.choice])).argsort(1)[:, : case.top_k]
    return np.where(real, order - case.count if case.choice == "elsewhere" else order, -1)


def distinct_experts(case: Case) -> float:
    """How many experts of this device a step reads, on average over random choices."""
    if case.choice == "one":
        return 1
    count = {"random": case.count, "some": case.top_k + 1, "elsewhere": 4 * case.count}[case.choice]
    chosen = 1 - (1 - case.top_k / count) ** (case.tokens - case.padding)
    return min(count, case.count) * chosen


def cost(case: Case) -> Cost:
    """The weights of the experts chosen, on average, and x are read once, and the result is written
    once; three products of each pair of a token and an expert that is here."""
    matrices = 3 * case.ffn * case.hidden
    biases = (2 * case.ffn + case.hidden) * case.biased
    vectors = 2 * case.tokens * case.hidden
    size = jnp.dtype(case.dtype).itemsize
    pairs = (case.tokens - case.padding) * case.top_k / (4 if case.choice == "elsewhere" else 1)
    read = (distinct_experts(case) * (matrices + biases) + vectors) * size
    return Cost(read + 8 * case.tokens * case.top_k, 2.0 * pairs * matrices)


def promised(case: Case, output: jax.Array) -> jax.Array:
    """What the op promises of its terms: their total."""
    return output.sum(0, dtype=jnp.promote_types(output.dtype, jnp.float32))
