"""The op in jnp: pairs of a token and an expert, sorted by expert. The engine's path on a CPU.

Its ``ragged_dot`` is a grouped product on a CPU and a TPU; on CUDA, XLA makes it a masked product
with every expert, so GPUs need a kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.expert_ffn.activations import GATED


def expert_ffn(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
    activation: str = "silu",
) -> jax.Array:
    """See ``api.expert_ffn``; it gives one term."""
    count, _, size, hidden = up.shape
    top_k = experts.shape[1]
    chosen = experts.reshape(-1)
    here = (chosen >= 0) & (chosen < count)
    # Those of other devices go to the end, behind every group, where products give zero.
    order = jnp.argsort(jnp.where(here, chosen, count), stable=True)
    expert = jnp.where(here, chosen, 0)[order]
    sizes = jnp.bincount(jnp.where(here, chosen, count), length=count + 1)[:count]

    h = _product(x[order // top_k], up.reshape(count, 2 * size, hidden), sizes)
    h = h.reshape(-1, 2, size)
    if up_bias is not None:
        h = h + up_bias[expert]
    y = _product(GATED[activation](h[:, 0], h[:, 1]), down, sizes)
    if down_bias is not None:
        y = y + down_bias[expert]
    y = y * jnp.where(here, weights.reshape(-1), 0)[order][:, None]
    total = jnp.zeros(x.shape, y.dtype).at[order // top_k].add(y)
    return total.astype(x.dtype)[None]


def _product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [P, inputs] by w [E, outputs, inputs], the first sizes[0] rows by w[0] and so on; summed
    and given in float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(
        x,
        w.transpose(0, 2, 1),
        sizes,
        precision=precision,
        preferred_element_type=wide,
    ).astype(wide)
