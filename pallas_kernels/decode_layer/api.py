"""The op's signature and the order of its implementations."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.decode_layer import mosaic_gpu, reference
from pallas_kernels.decode_layer.types import Experts, LayerWeights
from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_attention import AttentionBatch
from pallas_kernels.rope_kv_write import HeadNorm
from pallas_kernels.rope_kv_write.types import CosSin

IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu.decode_layer, "reference": reference.decode_layer}


def decode_layer(
    x: jax.Array,
    qkv: jax.Array,
    cos_sin: CosSin | None,
    head_norm: HeadNorm | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    weights: LayerWeights,
    *,
    scale: float,
    sliding_window: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A decoder layer for one token: attention, residual, norm, feed-forward network, residual,
    norm, and the product behind them.

    Args:
        x: [1, hidden], the residual stream before the layer.
        qkv, cos_sin, head_norm, k_pages, v_pages, page, slot: see ``rope_kv_write``.
        page_table, batch: see ``paged_attention``; the batch has one lane, with one query.
        weights: of x's dtype.
        scale, sliding_window: see ``paged_attention``.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        The residual stream behind the layer, [1, hidden]; the next product, float32 [1, outputs];
        and the new pages.

    Raises:
        ValueError: shapes don't fit together.
        ExceptionGroup: no implementation can run the case.
    """
    _check(x, qkv, weights)
    arguments = (x, qkv, cos_sin, head_norm, k_pages, v_pages, page, slot, page_table, batch)
    options = {"scale": scale, "sliding_window": sliding_window}
    return dispatch.call(
        "decode_layer", IMPLEMENTATIONS, implementation, *arguments, weights, **options
    )


def _check(x: jax.Array, qkv: jax.Array, weights: LayerWeights) -> None:
    _, tokens, kv_heads, parts, size = qkv.shape
    hidden, inputs = x.shape[1], kv_heads * (parts - 2) * size
    if (x.shape[0], tokens) != (1, 1) or weights.out.shape != (hidden, inputs):
        raise ValueError(f"x {x.shape}, qkv {qkv.shape} and out {weights.out.shape} don't fit")
    ffn = weights.ffn
    many = (ffn.router.shape[0],) if isinstance(ffn, Experts) else ()
    width = ffn.down.shape[-1]
    if (ffn.up.shape, ffn.down.shape) != ((*many, 2, width, hidden), (*many, hidden, width)):
        raise ValueError(f"x {x.shape}, up {ffn.up.shape} and down {ffn.down.shape} don't fit")
    if isinstance(ffn, Experts) and ffn.router.shape[1] != hidden:
        raise ValueError(f"x {x.shape} and the router {ffn.router.shape} don't fit")
    if weights.next.shape[1:] != (hidden,):
        raise ValueError(f"x {x.shape} and the next weight {weights.next.shape} don't fit")
