"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.add_rms_norm import RMSNorm
from pallas_kernels.decode_attention import cases as attention_cases
from pallas_kernels.decode_layer.types import Experts, GatedMLP, LayerWeights
from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, QWEN3_30B_A3B, Cost, LayerShape, normal


@dataclass(frozen=True)
class Case:
    """One token: what ``attention`` says, whose only lane is decoded, the widths, and ``outputs``
    of the next product; ``top_k`` of ``experts``, or no experts."""

    name: str
    attention: attention_cases.Case
    hidden: int = 256
    ffn: int = 256
    outputs: int = 32
    experts: int = 0
    top_k: int = 0
    normalize: bool = True

    @property
    def dtype(self) -> str:
        return self.attention.dtype

    @property
    def inputs(self) -> int:
        return self.attention.attention.heads * self.attention.attention.head_size


WIDTHS = {"hidden", "ffn", "outputs", "experts", "top_k", "normalize"}


def _case(name: str, tokens: int = 37, **settings: Any) -> Case:
    settings = {"dtype": "bfloat16", "padding": 0} | settings
    own: dict[str, Any] = {key: settings.pop(key) for key in WIDTHS & settings.keys()}
    return Case(name, attention_cases.case(name, (tokens,), **settings), **own)


ODD: dict[str, Any] = {"head_size": 8, "heads": 5, "kv_heads": 5, "dtype": "float32"}
CASES = (
    _case("plain"),
    _case("head norms, float16", normalizes=True, dtype="float16", outputs=12),
    _case("2 of 12 experts", experts=12, top_k=2),
    _case("first token", tokens=1, heads=12, kv_heads=4),
    _case("widths that are no powers of two", 333, heads=20, hidden=768, ffn=1792, outputs=1156),
    _case("cut rows everywhere", 300, heads=32, head_size=128, hidden=2560, ffn=3072, outputs=64),
    _case("group 7, head norms", 700, heads=28, kv_heads=4, head_size=128, normalizes=True),
    _case("group 20", 333, heads=40, head_size=64, hidden=512),
    _case("group 1, no rotation", 48, heads=4, kv_heads=4, rotates=False),
    _case("page size 64, window", 1500, page_size=64, sliding_window=200),
    _case("window of one token", 50, sliding_window=1),
    _case("head size 256", 130, heads=2, kv_heads=1, head_size=256),
    _case("many splits", 9000, heads=16, kv_heads=2, head_size=128),
    _case("8 of 128 experts", 64, experts=128, top_k=8, hidden=512, ffn=768, outputs=300),
    _case("experts' own shares", experts=60, top_k=4, normalize=False, ffn=512),
    _case("float32", dtype="float32"),
    _case("odd sizes", 3, hidden=24, ffn=72, outputs=7, **ODD),
)
"""The first four are small enough for the interpreter."""

FRESH = ("x",)
"""Arguments that differ between calls which otherwise are equal."""
CARRIED = {"k_pages": 2, "v_pages": 3}
"""Argument -> the output that may take over its buffer."""


def of_layer(layer: LayerShape, name: str, tokens: int, outputs: int | None = None) -> Case:
    """A model's layer, with the next one's queries, keys and values behind it if not told else."""
    return Case(
        name,
        attention_cases.of_layer(layer, name, (tokens,)),
        layer.hidden,
        layer.ffn,
        outputs or (layer.heads + 2 * layer.kv_heads) * layer.head_size,
        layer.num_experts,
        layer.top_k,
    )


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Small steps that an implementation must pass before a model with such layers uses it."""
    changed = layer.softcap is not None or layer.alibi or layer.sinks or layer.biased
    if layer.latent_size or layer.activation != "silu" or changed:
        return ()
    # A whole layer's weights are too many to draw.
    few: dict[str, Any] = {"ffn": min(layer.ffn, 1024), "experts": min(layer.num_experts, 16)}
    return (replace(of_layer(layer, "part of a layer", 333, 256), **few),)


QWEN3 = replace(QWEN3_30B_A3B, normalizes=True)
BENCHMARKS = (
    of_layer(LLAMA_1B, "1B", 300),
    of_layer(LLAMA_1B, "1B, 4096 tokens", 4096),
    of_layer(LLAMA_1B, "1B, 32768 tokens", 32768),
    of_layer(LLAMA_1B, "1B, head", 300, outputs=128256),
    of_layer(LLAMA_8B, "8B", 300),
    of_layer(LLAMA_8B, "8B, 4096 tokens", 4096),
    of_layer(LLAMA_8B, "8B, head", 300, outputs=128256),
    of_layer(QWEN3, "Qwen3-30B", 300),
    of_layer(QWEN3, "Qwen3-30B, 4096 tokens", 4096),
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``decode_layer``."""
    arguments = attention_cases.make(case.attention, seed)
    del arguments["dtype"]
    arguments["head_norm"] = arguments.pop("norm")
    x = normal(np.random.default_rng(seed + 2), (1, case.hidden), case.dtype)
    return {**arguments, "x": x, "weights": make_weights(case, seed + 3)}


def make_weights(case: Case, seed: int) -> LayerWeights:
    """Random weights, whose products are about as large as what they multiply."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> jax.Array:
        return (normal(rng, shape, "float32") * shape[-1] ** -0.5).astype(case.dtype)

    def norm() -> RMSNorm:
        return RMSNorm(1 + normal(rng, (case.hidden,), case.dtype) / 4, 1e-5)

    many = (case.experts,) if case.experts else ()
    up, down = weight(*many, 2, case.ffn, case.hidden), weight(*many, case.hidden, case.ffn)
    ffn: GatedMLP | Experts = GatedMLP(up, down)
    if case.experts:
        ffn = Experts(weight(case.experts, case.hidden), up, down, case.top_k, case.normalize)
    out = weight(case.hidden, case.inputs)
    return LayerWeights(out, norm(), ffn, norm(), weight(case.outputs, case.hidden))


def cost(case: Case) -> Cost:
    """Every weight in use is read once, and multiplied by one number; and attention's."""
    networks = max(1, case.top_k)
    weights = case.hidden * (case.inputs + 3 * networks * case.ffn + case.outputs + case.experts)
    bytes_, flops = attention_cases.cost(case.attention)
    return Cost(bytes_ + float(weights * jnp.dtype(case.dtype).itemsize), flops + 2.0 * weights)


def specified(case: Case, arguments: dict[str, Any]) -> tuple[np.ndarray | None, ...]:
    """Per output the places that the op promises: of the pages, not the padding's."""
    pages = np.arange(arguments["k_pages"].shape[0]) > 0
    return None, None, pages, pages


def poison(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with NaN where nobody may read, as attention's."""
    return attention_cases.poison(case.attention, arguments)
