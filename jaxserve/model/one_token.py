"""A step of one token, in which each layer from its queries, keys and values to the next one's is
one kernel: its parts are too short for kernels of their own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxserve.distributed import tensor_parallel_size
from jaxserve.model import attention, rope
from jaxserve.model.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig, MoESpec
from jaxserve.model.inputs import StepInputs
from jaxserve.model.kv_cache import KVCache, LayerCache
from jaxserve.model.params import Params, under
from jaxserve.quant import linear
from pallas_kernels.add_rms_norm import RMSNorm
from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.decode_layer import Experts, GatedMLP, LayerWeights, decode_layer
from pallas_kernels.dispatch import CHOOSE, Kernels
from pallas_kernels.lowering import hopper_cores

MAX_CONTEXT = 8192
"""Tokens of a sequence up to which steps take this way: its attention goes through long contexts
more slowly than the Triton kernel (on an H200, beside that one and one for the products, a layer of
1B takes 41 instead of 46 µs with 300 tokens, and 56 instead of 58 with 8192)."""


def gains(config: ModelConfig, dtype: jnp.dtype) -> bool:
    """Whether steps of one token should be programs of their own, on one device like this one."""
    try:
        hopper_cores()
    except NotImplementedError:
        return False
    return dtype.itemsize == 2 and _is_plain(config)


def fits(config: ModelConfig, kernels: Kernels, inputs: StepInputs) -> bool:
    """Whether ``forward`` may be tried. Not where somebody wants other kernels for a layer's
    parts."""
    one = inputs.token_ids.shape[0] == 1 and inputs.attention.row.shape[0] == 1
    own = kernels.decode_layer or kernels == CHOOSE
    return bool(one and own) and tensor_parallel_size() == 1 and _is_plain(config)


def _is_plain(config: ModelConfig) -> bool:
    """Whether all of the model is what ``decode_layer`` computes."""
    head = config.final_norm is not None and config.final_norm.kind == "rms"
    changed = config.logit_softcap is not None or config.embedding_size != config.hidden_size
    return head and not changed and all(map(_is_plain_layer, config.layers))


def _is_plain_layer(layer: LayerSpec) -> bool:
    if layer.norm_order != "pre" or layer.parallel is not None or layer.norm.kind != "rms":
        return False
    return _is_plain_attention(layer) and _is_plain_ffn(layer.ffn)


def _is_plain_attention(layer: LayerSpec) -> bool:
    spec = layer.attention
    if not isinstance(spec, AttentionSpec) or spec.out_bias:
        return False
    scores = spec.softcap is None and not spec.sinks and not spec.alibi
    norms = spec.qk_norm is None or spec.qk_norm.kind == "rms"
    return scores and norms and spec.log_length is None


def _is_plain_ffn(spec: MLPSpec | MoESpec) -> bool:
    if isinstance(spec, MLPSpec):
        return spec.gated and spec.activation == "silu" and not (spec.up_bias or spec.down_bias)
    router = spec.router
    choice = router.scores == "softmax" and router.groups == 1
    more = spec.bias or spec.shared is not None or router.bias or router.correction
    return spec.activation == "silu" and choice and not more


def forward(
    config: ModelConfig,
    params: Params,
    head: str,
    x: jax.Array,
    cache: KVCache,
    inputs: StepInputs,
    kernels: Kernels,
) -> tuple[jax.Array, KVCache]:
    """The logits float32 [1, vocab] of the embedded token x [1, hidden], and the new cache.

    Args:
        head: the path of the logits' weight.

    Raises:
        NotImplementedError: there is no kernel for it here.
    """
    angles = rope.tables(config.rope_specs, inputs.positions, inputs.rope_lengths)
    groups, places = config.page_groups, list(cache)
    inputs_of = [inputs.of_table(table) for table in range(len(groups.windows))]

    def product(index: int) -> tuple[RMSNorm, jax.Array]:
        """The norm and the product that a layer begins with, or those behind the last one."""
        if index == len(config.layers):
            assert config.final_norm is not None  # said by ``fits``
            return RMSNorm(params["head/norm/scale"], config.final_norm.eps), params[head]
        scale = params[f"layers/{index}/attention_norm/scale"]
        norm = RMSNorm(scale, config.layers[index].norm.eps)
        return norm, params[f"layers/{index}/attention/qkv"]

    norm, weight = product(0)
    h = rms_norm(x, norm.scale, norm.eps)
    y = linear(h, weight, jnp.float32, kernels.fused_linear)[None]  # one term, as behind a layer
    for index, layer in enumerate(config.layers):
        place, own = groups.place[index], inputs_of[groups.table[index]]
        cos_sin, weights = angles[layer.attention.rope], under(f"layers/{index}", params)
        x, y, places[place] = _layer(
            *(layer, kernels, weights, x, y, places[place], own, cos_sin), *product(index + 1)
        )
    return y[0], tuple(places)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
    layer: LayerSpec,
    kernels: Kernels,
    params: Params,
    x: jax.Array,
    qkv: jax.Array,
    cache: LayerCache,
    inputs: StepInputs,
    cos_sin: rope.CosSin | None,
    next_norm: RMSNorm,
    next_weight: jax.Array,
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """From one term of a layer's queries, keys and values to that [1, 1, outputs...] of the product
    behind the layer."""
    spec, own = layer.attention, under("attention", params)
    assert isinstance(spec, AttentionSpec)  # said by ``fits``
    if spec.qkv_bias:
        qkv = qkv + own["qkv_bias"]
    hidden = x.shape[1]
    weights = LayerWeights(
        own["out"].reshape(hidden, -1),
        RMSNorm(params["ffn_norm/scale"], layer.norm.eps),
        _ffn(layer.ffn, under("ffn", params)),
        next_norm,
        next_weight.reshape(-1, hidden),
    )
    k_pages, v_pages = cache
    x, y, k_pages, v_pages = decode_layer(
        x,
        qkv,
        cos_sin,
        attention.rms_head_norm(spec, own),
        k_pages,
        v_pages,
        inputs.write_page,
        inputs.write_slot,
        inputs.page_table,
        inputs.attention,
        weights,
        scale=spec.scale,
        sliding_window=spec.sliding_window,
        # Not the reference: without the kernel, the ops that it joins are faster.
        implementation=kernels.decode_layer or "mosaic_gpu",
    )
    return x, y.reshape(1, 1, *next_weight.shape[:-1]), (k_pages, v_pages)


def _ffn(spec: MLPSpec | MoESpec, params: Params) -> GatedMLP | Experts:
    if isinstance(spec, MLPSpec):
        return GatedMLP(params["up"], params["down"])
    weights = params["router"], params["experts_up"], params["experts_down"]
    return Experts(*weights, spec.router.top_k, spec.router.normalize, spec.router.scale)
