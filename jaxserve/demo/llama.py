"""A Llama in pure functions, just large enough to train the demo model.

Parameters are a flat dict with Hugging Face's tensor names and orientation (`[out, in]`), so a
checkpoint is the dict itself. Shapes: B rows, T tokens, D width, N query heads, K KV heads, H head
size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, jax.Array]
Attention = Literal["xla", "cudnn"] | None
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    head_size: int = 64
    vocab: int = 2048
    context: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


TARGET = Shape(width=256, layers=6, heads=4, kv_heads=2, ffn=688)
DRAFT = Shape(width=128, layers=2, heads=2, kv_heads=1, ffn=344)


def param_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape; the head is tied to the embedding."""
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, shape.width),
        "model.norm.weight": (shape.width,),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (shape.width,),
            prefix + "post_attention_layernorm.weight": (shape.width,),
            prefix + "self_attn.q_proj.weight": (query, shape.width),
            prefix + "self_attn.k_proj.weight": (key, shape.width),
            prefix + "self_attn.v_proj.weight": (key, shape.width),
            prefix + "self_attn.o_proj.weight": (shape.width, query),
            prefix + "mlp.gate_proj.weight": (shape.ffn, shape.width),
            prefix + "mlp.up_proj.weight": (shape.ffn, shape.width),
            prefix + "mlp.down_proj.weight": (shape.width, shape.ffn),
        }
    return shapes


def init_params(shape: Shape, seed: int) -> Params:
    """Float32 parameters: norms one, matrices normal, the ones that add to the stream smaller."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, size in param_shapes(shape).items():
        if len(size) == 1:
            params[name] = jnp.ones(size, jnp.float32)
            continue
        scale = 0.02 if "embed" in name else size[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= (2 * shape.layers) ** 0.5
        params[name] = jnp.asarray(scale * rng.standard_normal(size, np.float32))
    return params


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding, half-split: x [B, T, heads, H] at positions [B, T]."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, -1).astype(x.dtype)


def decode(
    params: Params, tokens: jax.Array, positions: jax.Array, shape: Shape, attend: Attend
) -> jax.Array:
    """The last hidden states [B, T, D] of tokens [B, T]; the dtype is the norms' one.

    `attend(layer, q [B, T, N, H], k [B, T, K, H], v)` gives [B, T, N, H].
    """
    batch, length = tokens.shape
    dtype = params["model.norm.weight"].dtype
    x = params["model.embed_tokens.weight"][tokens].astype(dtype)
    for layer in range(shape.layers):

        def weight(name: str, layer: int = layer) -> jax.Array:
            return params[f"model.layers.{layer}.{name}.weight"]

        y = rms_norm(x, weight("input_layernorm"), shape.norm_eps)
        heads = (batch, length, -1, shape.head_size)
        q = (y @ weight("self_attn.q_proj").T).reshape(heads)
        k = (y @ weight("self_attn.k_proj").T).reshape(heads)
        v = (y @ weight("self_attn.v_proj").T).reshape(heads)
        q, k = (rotate(part, positions, shape.rope_theta) for part in (q, k))
        mixed = attend(layer, q, k, v).reshape(batch, length, -1)
        x = x + mixed @ weight("self_attn.o_proj").T
        y = rms_norm(x, weight("post_attention_layernorm"), shape.norm_eps)
        gate = jax.nn.silu(y @ weight("mlp.gate_proj").T)
        x = x + (gate * (y @ weight("mlp.up_proj").T)) @ weight("mlp.down_proj").T
    return rms_norm(x, params["model.norm.weight"], shape.norm_eps)


def unembed(params: Params, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    table = params["model.embed_tokens.weight"].astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def forward(
    params: Params, tokens: jax.Array, shape: Shape, implementation: Attention = None
) -> jax.Array:
    """Float32 logits [B, T, V] of whole rows tokens [B, T] under a causal mask."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return unembed(params, decode(params, tokens, positions, shape, attend))


def forward_cached(
    params: Params, tokens: jax.Array, start: jax.Array, cache: jax.Array, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Hidden states [B, T, D] of tokens [B, T] that follow `start` [B] earlier ones, and the cache.

    The cache is [layers, 2, B, slots, K, H]; a token's slot is its position.
    """
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    rows = jnp.arange(tokens.shape[0])[:, None]
    mask = jnp.arange(cache.shape[3]) <= positions[:, None, :, None]  # [B, 1, T, slots]

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal cache
        cache = cache.at[layer, 0, rows, positions].set(k)
        cache = cache.at[layer, 1, rows, positions].set(v)
        return jax.nn.dot_product_attention(q, cache[layer, 0], cache[layer, 1], mask=mask)

    hidden = decode(params, tokens, positions, shape, attend)
    return hidden, cache
