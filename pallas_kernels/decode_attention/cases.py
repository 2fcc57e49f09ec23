"""Shapes that tests and benchmarks share, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import cases as attention_cases
from pallas_kernels.rope_kv_write import cases as rope_cases
from pallas_kernels.workload import LLAMA_1B, LLAMA_8B, QWEN3_30B_A3B, Cost, LayerShape


@dataclass(frozen=True)
class Case:
    """A step of decoding: what ``attention`` says, whose lanes have one new token each, and how
    its queries and keys are made, as in ``rope_kv_write``'s cases."""

    name: str
    attention: attention_cases.Case
    rotates: bool = True
    rotary_size: int | None = None
    normalizes: bool = False
    terms: int = 1

    @property
    def dtype(self) -> str:
        return self.attention.dtype


def case(name: str, lanes: tuple[int, ...] = (1, 17, 32, 333), **settings: Any) -> Case:
    own = {"rotates", "rotary_size", "normalizes", "terms"} & settings.keys()
    others = {key: value for key, value in settings.items() if key not in own}
    attention = attention_cases.Case(name, tuple((1, total) for total in lanes), **others)
    return Case(name, attention, **{key: settings[key] for key in own})


CASES = (
    case("plain"),
    case("three terms, bfloat16", terms=3, dtype="bfloat16"),
    case("group 1, head size 96", heads=3, kv_heads=3, head_size=96),
    case("group 7, head norms", heads=7, kv_heads=1, head_size=128, normalizes=True),
    case("half of a head rotates", rotary_size=32, normalizes=True),
    case("no rotation", rotates=False),
    case("head size 12", head_size=12),
    case("page size 64, window", page_size=64, sliding_window=50),
    case("one long lane", (1500,), padding=0),
    case("long, window, sinks", (1500,), sliding_window=200, sinks=True, padding=0),
    case("softcap, float16", softcap=2.0, dtype="float16"),
)

CARRIED = {"k_pages": 1, "v_pages": 2}
"""Argument -> the output that may take over its buffer."""


def of_layer(layer: LayerShape, name: str, lanes: tuple[int, ...], padding: int = 0) -> Case:
    """A step over a model's layer."""
    steps = tuple((1, total) for total in lanes)
    return Case(
        name,
        attention_cases.of_layer(layer, name, steps, padding),
        rotates=layer.rotates,
        rotary_size=layer.rotary_size,
        normalizes=layer.normalizes,
    )


def gate_cases(layer: LayerShape) -> tuple[Case, ...]:
    """Small steps that an implementation must pass before a model with such layers uses it."""
    if layer.latent_size is not None:
        return ()
    return (of_layer(layer, "decode", (1, 17, 200, 333), 2),)


LAYERS = {"1B": LLAMA_1B, "8B": LLAMA_8B, "Qwen3-30B": replace(QWEN3_30B_A3B, normalizes=True)}
BENCHMARKS = tuple(
    of_layer(layer, f"{name}, {lanes}x{length}", (length,) * lanes)
    for name, layer in LAYERS.items()
    for lanes, length in ((1, 300), (64, 300), (256, 1024))
)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Random arguments of ``decode_attention``; each token's page and slot hold garbage."""
    shape = case.attention
    arguments = attention_cases.make(shape, seed)
    tokens = arguments.pop("q").shape[0]
    batch, table = arguments["batch"], np.asarray(arguments["page_table"])
    last = np.maximum(np.asarray(batch.kv_len) - 1, 0)
    page = table[np.asarray(batch.row), last // shape.page_size]
    page = np.where(np.asarray(batch.kv_len) > 0, page, 0)
    rotated = rope_cases.Case(
        case.name,
        tokens,
        shape.kv_heads,
        shape.heads // shape.kv_heads,
        shape.head_size,
        shape.page_size,
        case.rotates,
        case.rotary_size,
        case.normalizes,
        shape.dtype,
        padding=0,
        terms=case.terms,
    )
    return {
        **rope_cases.make(rotated, seed + 1),
        **arguments,
        "page": jnp.asarray(page, jnp.int32),
        "slot": jnp.asarray(last % shape.page_size, jnp.int32),
    }


def cost(case: Case) -> Cost:
    """As attention's: what the queries are made of is the few bytes that they are."""
    return attention_cases.cost(case.attention)


def specified(case: Case, arguments: dict[str, Any]) -> tuple[np.ndarray | None, ...]:
    """Per output the places that the op promises: the lanes' tokens, and all pages but the
    padding's."""
    queries = np.zeros(arguments["qkv"].shape[1], bool)
    queries[: len(case.attention.lanes)] = True
    pages = np.arange(arguments["k_pages"].shape[0]) > 0
    return queries, pages, pages


def poison(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with NaN where nobody may read: as attention's, and where the new keys and
    values go."""
    poisoned = attention_cases.poisoned
    window, lanes = case.attention.sliding_window, case.attention.lanes
    place = arguments["page"], slice(None), arguments["slot"]

    def pool(pages: jax.Array) -> jax.Array:
        return poisoned(pages, lanes, arguments, window).at[place].set(jnp.nan)

    return arguments | {name: pool(arguments[name]) for name in ("k_pages", "v_pages")}
