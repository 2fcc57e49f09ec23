"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.route_experts import reference
from pallas_kernels.workload import MIXTRAL_8X7B, QWEN3_30B_A3B, Cost, LayerShape, normal

CLEAR = 1e-4
"""Scores that lie closer together, as a share of a row's best, may change places by rounding."""


@dataclass(frozen=True)
class Case:
    """Tokens that choose ``top_k`` of ``count`` experts each; see the op.

    Attributes:
        padding: so many of the tokens are padding.
        ties: logits are multiples of a quarter, which no rounding changes, so that many tie.
    """

    name: str
    tokens: int = 5
    count: int = 8
    top_k: int = 2
    hidden: int = 64
    dtype: str = "float32"
    scores: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    biased: bool = False
    corrected: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    padding: int = 0
    ties: bool = False


def of_layer(layer: LayerShape, name: str, tokens: int) -> Case:
    """Tokens that choose among a model's experts."""
    shape = layer.num_experts, layer.top_k, layer.hidden, layer.dtype
    return Case(name, tokens, *shape, normalize=True)


MODELS = {
    "Mixtral": of_layer(MIXTRAL_8X7B, "", 1),
    "Qwen3 30B": of_layer(QWEN3_30B_A3B, "", 1),
    "Qwen1.5 MoE": Case("", 1, 60, 4, 2048, "bfloat16"),
    "gpt-oss 20B": Case("", 1, 32, 4, 2880, "bfloat16", normalize=True, biased=True),
    "gpt-oss 120B": Case("", 1, 128, 4, 2880, "bfloat16", normalize=True, biased=True),
    "DeepSeek-V3 without groups": Case(
        "", 1, 256, 8, 7168, "bfloat16", "sigmoid", True, 2.5, corrected=True
    ),
}
"""Routers of real models; Qwen1.5 MoE is the model type qwen2_moe."""

CASES = (
    Case("plain"),
    Case("one token", tokens=1),
    Case("the best alone", top_k=1),
    Case("all of them", count=12, top_k=12),
    Case("normalized, scaled", normalize=True, scale=2.5),
    Case("bias", tokens=8, biased=True, normalize=True),
    Case("sigmoid", tokens=17, scores="sigmoid"),
    Case("sigmoid, correction", tokens=33, scores="sigmoid", normalize=True, corrected=True),
    Case("softmax, bias, correction", tokens=64, biased=True, corrected=True),
    Case("padding", tokens=8, padding=7),
    Case("blocks of padding", tokens=50, padding=40),
    Case("ties", tokens=33, count=40, top_k=6, ties=True),
    Case("ties, bfloat16", tokens=64, count=128, top_k=8, dtype="bfloat16", ties=True),
    Case("odd sizes", tokens=9, count=5, top_k=3, hidden=72),
    Case("odd sizes, bfloat16", tokens=3, count=77, top_k=7, hidden=1000, dtype="bfloat16"),
    Case("float16", tokens=8, count=32, top_k=4, hidden=256, dtype="float16", biased=True),
    Case("one group of four", count=12, groups=4, scale=16.0),
    Case(
        "groups by their best two",
        *(11, 12, 4),
        scores="sigmoid",
        normalize=True,
        corrected=True,
        groups=3,
        top_groups=2,
        group_score="top2",
    ),
    *(replace(case, name=model, tokens=3) for model, case in MODELS.items()),
)

FRESH = ("x",)
"""Arguments that differ between calls which otherwise are equal."""


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Routers that an implementation must pass before a model with such layers uses it, of all
    kinds: a layer's shape doesn't tell them apart."""
    if not layer.num_experts:
        return ()
    few, many = of_layer(layer, "3 tokens", 3), of_layer(layer, "300 tokens", 300)
    sigmoid = replace(few, scores="sigmoid", scale=2.5, corrected=True)
    return (
        few,
        replace(many, normalize=False),
        replace(few, name="40 tokens, bias, padding", tokens=40, biased=True, padding=20),
        replace(sigmoid, name="3 tokens, sigmoid, correction"),
    )


BENCHMARKS = (
    *(
        replace(case, name=f"{model}, {tokens} tokens", tokens=tokens)
        for model, case in MODELS.items()
        for tokens in (1, 8, 64, 256)
    ),
    *(  # the smallest step of an engine, with a single request
        replace(case, name=f"{model}, 1 of 8 tokens", tokens=8, padding=7)
        for model, case in MODELS.items()
    ),
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``route_experts``."""
    rng = np.random.default_rng(seed)
    x, w = ((case.tokens, case.hidden), (case.count, case.hidden))
    arguments = {
        "x": normal(rng, x, case.dtype),
        "w": normal(rng, w, case.dtype) * (2 * case.hidden**-0.5),
        "bias": normal(rng, (case.count,), case.dtype) if case.biased else None,
        "correction": 0.1 * normal(rng, (case.count,), "float32") if case.corrected else None,
        "is_token": jnp.arange(case.tokens) < case.tokens - case.padding if case.padding else None,
    }
    if case.ties:
        arguments["x"] = jnp.asarray(rng.integers(-1, 2, x), case.dtype)
        arguments["w"] = jnp.asarray(rng.integers(-1, 2, w) / 4, case.dtype)
    names = "top_k", "scores", "normalize", "scale", "groups", "top_groups", "group_score"
    return arguments | {name: getattr(case, name) for name in names}


def poison(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with NaN in the rows of padding."""
    if not case.padding:
        return arguments
    x = jnp.where(arguments["is_token"][:, None], arguments["x"], jnp.nan)
    return arguments | {"x": x.astype(case.dtype)}


def specified(case: Case, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of tokens whose choice no rounding decides; padding's experts are promised too."""
    one_more = {"top_k": min(case.top_k + 1, case.count), "normalize": False, "scale": 1.0}
    experts, best = reference.route_experts(**arguments | one_more | {"is_token": None})
    if case.corrected:
        best = best + arguments["correction"][experts]
    gaps = best[:, :-1] - best[:, 1:]
    clear = np.asarray(gaps > CLEAR * best[:, :1]).all(1) | case.ties
    real = np.arange(case.tokens) < case.tokens - case.padding
    return clear | ~real, clear & real


def promised(case: Case, output: jax.Array) -> jax.Array:
    """The experts' numbers as floats, which the gates compare, and the weights as they are."""
    return output.astype(jnp.promote_types(output.dtype, jnp.float32))


def tolerance(case: Case) -> float:
    """Logits are summed in float32, whatever x is. A wrong expert is a larger error."""
    return 1e-4


def cost(case: Case) -> Cost:
    """x and the weight are read once, and the choice is written once."""
    read = (case.tokens + case.count) * case.hidden * jnp.dtype(case.dtype).itemsize
    written = 8 * case.tokens * case.top_k
    return Cost(float(read + written), 2.0 * case.tokens * case.count * case.hidden)
