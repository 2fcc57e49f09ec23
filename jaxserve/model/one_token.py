"""A step of one token, in which all products between two attentions are one kernel: they are too
short for kernels of their own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxserve.distributed import tensor_parallel_size
from jaxserve.model import attention, rope
from jaxserve.model.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig
from jaxserve.model.inputs import StepInputs
from jaxserve.model.kv_cache import KVCache, LayerCache
from jaxserve.model.params import Params, under
from jaxserve.quant import linear
from pallas_kernels.add_rms_norm import RMSNorm
from pallas_kernels.arithmetic import rms_norm
from pallas_kernels.decode_chain import ChainWeights, decode_chain
from pallas_kernels.dispatch import Kernels
from pallas_kernels.lowering import hopper_cores


def gains(config: ModelConfig, dtype: jnp.dtype) -> bool:
    """Whether steps of one token should be programs of their own, on one device like this one."""
    try:
        hopper_cores()
    except NotImplementedError:
        return False
    return dtype.itemsize == 2 and _is_chain(config)


def fits(config: ModelConfig, kernels: Kernels, inputs: StepInputs) -> bool:
    """Whether ``forward`` may be tried. Not where somebody wants other kernels inside the chain."""
    one = inputs.token_ids.shape[0] == 1 and inputs.attention.row.shape[0] == 1
    own = kernels.decode_chain or not (kernels.fused_linear or kernels.add_rms_norm)
    return bool(one and own) and tensor_parallel_size() == 1 and _is_chain(config)


def _is_chain(config: ModelConfig) -> bool:
    head = config.final_norm is not None and config.final_norm.kind == "rms"
    changed = config.logit_softcap is not None or config.embedding_size != config.hidden_size
    return head and not changed and all(map(_is_plain, config.layers))


def _is_plain(layer: LayerSpec) -> bool:
    spec, ffn = layer.attention, layer.ffn
    if layer.norm_order != "pre" or layer.parallel is not None or layer.norm.kind != "rms":
        return False
    if not isinstance(spec, AttentionSpec) or spec.out_bias or not isinstance(ffn, MLPSpec):
        return False
    return ffn.gated and ffn.activation == "silu" and not (ffn.up_bias or ffn.down_bias)


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
    """From terms of a layer's queries, keys and values to the terms [1, 1, outputs...] of the
    product behind the layer."""
    spec, own = layer.attention, under("attention", params)
    assert isinstance(spec, AttentionSpec)  # said by ``fits``
    heads, cache = attention.attend(spec, own, qkv, cache, inputs, cos_sin, kernels, x.dtype)
    hidden = x.shape[1]
    weights = ChainWeights(
        own["out"].reshape(hidden, -1),
        RMSNorm(params["ffn_norm/scale"], layer.norm.eps),
        params["ffn/up"],
        params["ffn/down"],
        next_norm,
        next_weight.reshape(-1, hidden),
    )
    # Not the reference: without the kernel, the ops that it joins are faster.
    implementation = kernels.decode_chain or "mosaic_gpu"
    x, y = decode_chain(x, heads.reshape(1, -1), weights, implementation=implementation)
    return x, y.reshape(1, 1, *next_weight.shape[:-1]), cache
