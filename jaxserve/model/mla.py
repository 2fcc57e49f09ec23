"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) over paged latents.

The maps from the latent to keys and values are absorbed: instead of making every token's keys, the
queries are brought into the latent's space, and what attention gives there is mapped to values. So
the cache is read as if all heads shared one key, whose first part is the value too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.distributed import reduce_terms
from jaxserve.model import kv_cache, norms, rope
from jaxserve.model.config import LatentAttentionSpec
from jaxserve.model.inputs import StepInputs
from jaxserve.model.params import Param, Params, prefixed, under
from jaxserve.quant import linear, linear_terms
from pallas_kernels.dispatch import CHOOSE, Kernels
from pallas_kernels.latent_attention import latent_attention
from pallas_kernels.rope_kv_write import rotate


def declare(spec: LatentAttentionSpec, hidden_size: int) -> dict[str, Param]:
    """Weights: the maps into the latents (which every device holds), their norms, and per head the
    maps out of them; ``k_up`` [heads, nope_size, latent], ``v_up`` [heads, value_size, latent]."""
    heads, latent = spec.num_heads, spec.latent_size
    query_size = spec.nope_size + spec.rope_size
    tree = {
        "kv_down": Param((latent + spec.rope_size, hidden_size), (None, None)),
        "k_up": Param((heads, spec.nope_size, latent), ("heads", None, None)),
        "v_up": Param((heads, spec.value_size, latent), ("heads", None, None)),
        "out": Param((hidden_size, heads, spec.value_size), (None, "heads", None)),
    }
    tree |= prefixed("kv_norm", norms.declare(spec.norm, latent))
    if spec.bias:
        tree["kv_down_bias"] = Param((latent + spec.rope_size,), (None,), "zeros")
        tree["out_bias"] = Param((hidden_size,), (None,), "zeros")
    if spec.query_latent_size is None:
        tree["q"] = Param((heads, query_size, hidden_size), ("heads", None, None))
        return tree
    tree["q_down"] = Param((spec.query_latent_size, hidden_size), (None, None))
    if spec.bias:
        tree["q_down_bias"] = Param((spec.query_latent_size,), (None,), "zeros")
    tree["q_up"] = Param((heads, query_size, spec.query_latent_size), ("heads", None, None))
    return tree | prefixed("q_norm", norms.declare(spec.norm, spec.query_latent_size))


def apply(
    spec: LatentAttentionSpec,
    params: Params,
    x: jax.Array,
    cache: kv_cache.LayerCache,
    inputs: StepInputs,
    cos_sin: rope.CosSin,
    kernels: Kernels = CHOOSE,
    wanted: jax.Array | None = None,
) -> tuple[jax.Array, kv_cache.LayerCache]:
    """Attends from x [T, hidden] to each request's tokens so far.

    Args:
        wanted: int32 [W], the tokens whose output is wanted; None for all (W = T).

    Returns:
        Terms [S, W, hidden] whose sum is the output, and the layer's cache with this step's
        latents and rotated keys written.
    """
    q_nope, q_rope = jnp.split(_queries(spec, params, x, kernels), (spec.nope_size,), -1)
    kv = linear(x, params["kv_down"], implementation=kernels.fused_linear)
    if spec.bias:
        kv = kv + params["kv_down_bias"]
    latent, k_rope = jnp.split(kv, (spec.latent_size,), -1)
    latent = norms.apply(spec.norm, under("kv_norm", params), latent)
    entry = jnp.concatenate([latent, rotate(k_rope[:, None], cos_sin)[:, 0]], -1)
    (pages,) = cache
    pages = pages.at[inputs.write_page, 0, inputs.write_slot].set(entry.astype(pages.dtype))
    q = jnp.concatenate(
        [_per_head("thn,hnl->thl", q_nope, params["k_up"]), rotate(q_rope, cos_sin)], -1
    )
    o = latent_attention(
        q,
        pages,
        inputs.page_table,
        inputs.attention,
        scale=spec.scale,
        latent_size=spec.latent_size,
        implementation=kernels.latent_attention,
    )
    o = o if wanted is None else o[wanted]
    o = _per_head("thl,hvl->thv", o, params["v_up"])
    terms = linear_terms(o, params["out"], kernels.fused_linear)
    return reduce_terms(terms, params.get("out_bias")), (pages,)


def _queries(
    spec: LatentAttentionSpec, params: Params, x: jax.Array, kernels: Kernels
) -> jax.Array:
    """[T, heads, nope_size + rope_size]."""
    if spec.query_latent_size is None:
        return linear(x, params["q"], implementation=kernels.fused_linear)
    latent = linear(x, params["q_down"], implementation=kernels.fused_linear)
    if spec.bias:
        latent = latent + params["q_down_bias"]
    latent = norms.apply(spec.norm, under("q_norm", params), latent)
    return linear(latent, params["q_up"], implementation=kernels.fused_linear)


def _per_head(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, w, precision=precision)
