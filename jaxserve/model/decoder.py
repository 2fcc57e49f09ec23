"""The decoder: embedding, unrolled layers, final norm, logits of the sampled tokens only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.distributed import TENSOR, reduce_sum
from jaxserve.errors import ConfigError
from jaxserve.model import attention, ffn, mla, moe, norms, one_token, rope
from jaxserve.model.config import (
    AttentionSpec,
    LatentAttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    MoESpec,
)
from jaxserve.model.inputs import StepInputs
from jaxserve.model.kv_cache import KVCache, LayerCache
from jaxserve.model.params import Param, Params, prefixed, under
from jaxserve.model.residual import Residual
from jaxserve.quant import linear
from pallas_kernels.dispatch import CHOOSE, Kernels

ATTENTION: dict[type, Any] = {AttentionSpec: attention, LatentAttentionSpec: mla}
FFN: dict[type, Any] = {MLPSpec: ffn, MoESpec: moe}
"""The module of each kind of half, with its ``declare`` and ``apply``."""


def declare(config: ModelConfig) -> dict[str, Param]:
    """Every weight of the model by path, for example ``layers/0/attention/qkv``."""
    hidden, width = config.hidden_size, config.embedding_size
    tree = {"embed/tokens": Param((config.vocab_size, width), ("vocab", None))}
    if config.learned_positions is not None:
        table = config.learned_positions
        tree["embed/positions"] = Param((table.count + table.offset, hidden), (None, None))
    if width != hidden:
        tree["embed/project_in"] = Param((hidden, width), (None, None))
        tree["head/project_out"] = Param((width, hidden), (None, None))
    if config.embedding_norm is not None:
        tree |= prefixed("embed/norm", norms.declare(config.embedding_norm, hidden))
    for index, layer in enumerate(config.layers):
        tree |= prefixed(f"layers/{index}", _declare_layer(layer, hidden))
    if config.final_norm is not None:
        tree |= prefixed("head/norm", norms.declare(config.final_norm, hidden))
    if not config.tie_word_embeddings:
        tree["head/tokens"] = Param((config.vocab_size, width), ("vocab", None))
    return tree


def _declare_layer(layer: LayerSpec, hidden: int) -> dict[str, Param]:
    tree = prefixed("attention", ATTENTION[type(layer.attention)].declare(layer.attention, hidden))
    tree |= prefixed("ffn", FFN[type(layer.ffn)].declare(layer.ffn, hidden))
    names = ["attention_norm", "ffn_norm"]
    if layer.parallel == "one_norm":
        names = ["attention_norm"]
    if layer.norm_order == "sandwich":
        names += ["attention_out_norm", "ffn_out_norm"]
    for name in names:
        tree |= prefixed(name, norms.declare(layer.norm, hidden))
    return tree


def for_tensor_parallel(config: ModelConfig, size: int) -> ModelConfig:
    """The config whose KV heads split evenly over ``size`` devices, repeated where too few.

    Raises:
        ConfigError: heads, feed-forward width or experts don't divide.
    """

    def split(layer: LayerSpec) -> LayerSpec:
        spec, ffn_spec = _split_heads(layer.attention, size), layer.ffn
        experts = ffn_spec.num_experts if isinstance(ffn_spec, MoESpec) else 1
        if experts % size and ffn_spec.intermediate_size % size:
            whose = f" or the {experts} experts" if isinstance(ffn_spec, MoESpec) else ""
            raise ConfigError(
                f"tensor_parallel_size={size} doesn't divide the feed-forward width "
                f"{ffn_spec.intermediate_size}{whose}; use a divisor of it."
            )
        shared = ffn_spec.shared if isinstance(ffn_spec, MoESpec) else None
        if shared is not None and shared.intermediate_size % size:
            raise ConfigError(
                f"tensor_parallel_size={size} doesn't divide the shared expert's width "
                f"{shared.intermediate_size}; use a divisor of it."
            )
        return dataclasses.replace(layer, attention=spec)

    return dataclasses.replace(config, layers=tuple(split(layer) for layer in config.layers))


def _split_heads(
    spec: AttentionSpec | LatentAttentionSpec, size: int
) -> AttentionSpec | LatentAttentionSpec:
    def divides(size: int) -> bool:
        if isinstance(spec, LatentAttentionSpec):
            return spec.num_heads % size == 0
        kv = max(spec.num_kv_heads, size)
        return not (kv % size or kv % spec.num_kv_heads or spec.num_heads % kv)

    if not divides(size):
        usable = [str(n) for n in range(1, spec.num_heads + 1) if divides(n)]
        raise ConfigError(
            f"tensor_parallel_size={size} doesn't divide {spec.num_heads} attention heads and "
            f"{spec.num_kv_heads} KV heads; use {', '.join(usable)}."
        )
    if isinstance(spec, LatentAttentionSpec):
        return spec  # every device holds the latents
    return dataclasses.replace(spec, num_kv_heads=max(spec.num_kv_heads, size))


def forward(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    inputs: StepInputs,
    kernels: Kernels = CHOOSE,
) -> tuple[jax.Array, KVCache]:
    """Runs one step, with the kernels named. Under shard_map, arrays are one device's shards.

    Returns:
        float32 logits [L, vocab] (one device's part of the vocabulary where it is split) of the
        tokens ``inputs.sample_index``, and the cache with this step's keys and values.
    """
    if one_token.fits(config, kernels, inputs):
        x, head = _embed(config, kernels, params, inputs), head_weight(config)
        try:
            return one_token.forward(config, params, head, x, cache, inputs, kernels)
        except NotImplementedError:
            pass  # not on this device, or not with these sizes
    residual, cache = _run_layers(config, params, cache, inputs, kernels, inputs.sample_index)
    return logits(config, params, _final(config, kernels, params, residual), kernels), cache


def forward_with_hidden(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    inputs: StepInputs,
    kernels: Kernels = CHOOSE,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """As ``forward``, but also gives what the logits are made of, of all tokens: the final hidden
    states, normalized and projected, [T, embedding_size]."""
    residual, cache = _run_layers(config, params, cache, inputs, kernels)
    hidden = _final(config, kernels, params, residual)
    sampled = hidden if inputs.sample_index is None else hidden[inputs.sample_index]
    return logits(config, params, sampled, kernels), hidden, cache


def logits(
    config: ModelConfig, params: Params, hidden: jax.Array, kernels: Kernels = CHOOSE
) -> jax.Array:
    """The logits float32 [N, vocab] of final hidden states [N, embedding_size]."""
    scores = linear(hidden, params[head_weight(config)], jnp.float32, kernels.fused_linear)
    if config.logit_softcap is not None:
        scores = config.logit_softcap * jnp.tanh(scores / config.logit_softcap)
    return scores


def head_weight(config: ModelConfig) -> str:
    """The path of the one weight that ``logits`` needs."""
    return "embed/tokens" if config.tie_word_embeddings else "head/tokens"


def _run_layers(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    inputs: StepInputs,
    kernels: Kernels,
    wanted: jax.Array | None = None,
) -> tuple[Residual, KVCache]:
    """The stream of the tokens ``wanted`` [L] behind all layers; of all if None. The others have
    done their part with the last layer's keys and values."""
    residual = Residual(_embed(config, kernels, params, inputs))
    angles = rope.tables(config.rope_specs, inputs.positions, inputs.rope_lengths)
    groups, places = config.page_groups, list(cache)
    inputs_of = [inputs.of_table(table) for table in range(len(groups.windows))]
    for index, layer in enumerate(config.layers):
        weights = under(f"layers/{index}", params)
        cos_sin = angles[layer.attention.rope]
        place, own = groups.place[index], inputs_of[groups.table[index]]
        last = index == len(config.layers) - 1
        residual, places[place] = _layer(
            layer, kernels, weights, residual, places[place], own, cos_sin, wanted if last else None
        )
    return residual, tuple(places)


def _embed(config: ModelConfig, kernels: Kernels, params: Params, inputs: StepInputs) -> jax.Array:
    table = params["embed/tokens"]
    ids = inputs.token_ids
    if table.shape[0] < config.vocab_size:  # this device holds a part of the vocabulary
        ids = ids - jax.lax.axis_index(TENSOR) * table.shape[0]
        here = (ids >= 0) & (ids < table.shape[0])
        x = reduce_sum(jnp.where(here[:, None], table[jnp.where(here, ids, 0)], 0))
    else:
        x = table[ids]
    if config.embedding_scale != 1.0:
        x = x * config.embedding_scale
    if "embed/project_in" in params:
        x = linear(x, params["embed/project_in"], implementation=kernels.fused_linear)
    if config.learned_positions is not None:
        x = x + params["embed/positions"][inputs.positions + config.learned_positions.offset]
    if config.embedding_norm is not None:
        x = norms.apply(config.embedding_norm, under("embed/norm", params), x)
    return x


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
    layer: LayerSpec,
    kernels: Kernels,
    weights: Params,
    residual: Residual,
    cache: LayerCache,
    inputs: StepInputs,
    cos_sin: rope.CosSin | None,
    wanted: jax.Array | None,
) -> tuple[Residual, LayerCache]:
    """Like its halves, traced and lowered once for all layers that are alike. Behind the attention
    go on only the tokens ``wanted``, or all if None."""

    def attend(h: jax.Array) -> tuple[jax.Array, LayerCache]:
        own = under("attention", weights)
        return _attend(layer.attention, kernels, own, h, cache, inputs, cos_sin, wanted)

    def feed_forward(h: jax.Array) -> jax.Array:
        is_token = inputs.is_token if wanted is None else inputs.is_token[wanted]
        return _feed_forward(layer.ffn, kernels, under("ffn", weights), h, is_token)

    def before(which: str, residual: Residual) -> tuple[Residual, jax.Array]:
        if layer.norm_order == "post":
            return residual, residual.x
        return residual.normalized(layer.norm, under(which, weights), kernels)

    def after(which: str, residual: Residual, delta: jax.Array) -> Residual:
        if layer.norm_order == "sandwich":
            out_norm = under(which.replace("_norm", "_out_norm"), weights)
            delta = norms.apply(layer.norm, out_norm, delta.sum(0).astype(residual.x.dtype))[None]
        residual = Residual(residual.x, delta)
        if layer.norm_order == "post":
            residual = Residual(residual.normalized(layer.norm, under(which, weights), kernels)[1])
        return residual

    residual, h = before("attention_norm", residual)
    if layer.parallel is not None:
        same = layer.parallel == "one_norm"
        ffn_input = h if same else norms.apply(layer.norm, under("ffn_norm", weights), residual.x)
        ffn_input = ffn_input if wanted is None else ffn_input[wanted]
        h, new_cache = attend(h)
        terms = jnp.concatenate([h, feed_forward(ffn_input)])
        return Residual(residual.take(wanted).x, terms), new_cache
    h, new_cache = attend(h)
    residual = residual.take(wanted)
    residual, h = before("ffn_norm", after("attention_norm", residual, h))
    return after("ffn_norm", residual, feed_forward(h)), new_cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(
    spec: AttentionSpec | LatentAttentionSpec,
    kernels: Kernels,
    weights: Params,
    h: jax.Array,
    cache: LayerCache,
    inputs: StepInputs,
    cos_sin: rope.CosSin | None,
    wanted: jax.Array | None,
) -> tuple[jax.Array, LayerCache]:
    return ATTENTION[type(spec)].apply(spec, weights, h, cache, inputs, cos_sin, kernels, wanted)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _feed_forward(
    spec: MLPSpec | MoESpec, kernels: Kernels, weights: Params, h: jax.Array, is_token: jax.Array
) -> jax.Array:
    if isinstance(spec, MoESpec):
        return moe.apply(spec, weights, h, kernels, is_token)
    return ffn.apply(spec, weights, h, kernels)


def _final(config: ModelConfig, kernels: Kernels, params: Params, residual: Residual) -> jax.Array:
    if config.final_norm is None:
        x = residual.settled()
    else:
        x = residual.normalized(config.final_norm, under("head/norm", params), kernels)[1]
    if "head/project_out" in params:
        x = linear(x, params["head/project_out"], implementation=kernels.fused_linear)
    return x
