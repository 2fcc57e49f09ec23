"""A tunable implementation of ``fused_linear`` whose configurations are right, wrong and broken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fused_linear import reference


class Config(NamedTuple):
    """How often the product is computed, and what is wrong with it."""

    repeats: int
    fault: str = ""


def linear(x: jax.Array, w: jax.Array, *, config: Config | None = None, **options: Any) -> Any:
    """The reference's result, after ``repeats`` products; without a config, after 64."""
    config = config or Config(64)
    if config.fault == "compile":
        raise RuntimeError("this tile is too large")
    if config.fault == "unsupported":
        raise NotImplementedError("no such tile")
    if config.fault == "wrong":
        return 2 * reference.fused_linear(x, w, **options)

    def again(_: Any, y: jax.Array) -> jax.Array:
        return reference.fused_linear(x + 0 * y.ravel()[0], w, **options)

    return jax.lax.fori_loop(1, config.repeats, again, reference.fused_linear(x, w, **options))


def only_tuned(x: jax.Array, w: jax.Array, *, config: Config | None = None, **options: Any) -> Any:
    """The same, for cases only that the table has a configuration for."""
    if config is None:
        raise NotImplementedError("the table has no entry")
    return linear(x, w, config=config, **options)


def random(x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    """Right on the whole, and another result each time."""
    noise = jax.pure_callback(_noise, jax.ShapeDtypeStruct((), jnp.float32))
    return reference.fused_linear(x, w, **options) * (1 + noise).astype(x.dtype)


draws = iter(range(1, 1 << 30))


def _noise() -> Any:
    return jnp.float32(2**-7 * (next(draws) % 2))


def candidates(x: jax.Array, w: jax.Array, **options: Any) -> Iterator[Config]:
    """Fast but wrong, broken, impossible, right, right and slow."""
    yield Config(1, "wrong")
    yield Config(1, "compile")
    yield Config(1, "unsupported")
    yield Config(8)
    yield Config(128)


def tuning_key(x: jax.Array, w: jax.Array, **options: Any) -> str:
    """The shapes."""
    return f"{x.shape[0]}x{w.shape[-2]}"
