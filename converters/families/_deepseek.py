"""What DeepSeek-V2 and V3 share: latent attention and a mixture of experts beside shared ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from converters.families import _llama_like, _moe, _rope
from converters.families._llama_like import ACTIVATIONS, MAX_LENGTH, MAX_VOCAB, MAX_WIDTH
from converters.fields import Fields
from converters.lazy import Lazy, concatenate
from converters.rules import Layout, Rule, Source, half_split, stack_parts
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import (
    LatentAttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
)
from jaxserve.model.params import Param

LATENT_NORM = NormSpec("rms", 1e-6)
"""Norms of latents don't follow rms_norm_eps."""
SHARED = "layers.{i}.mlp.shared_experts."


def config(
    fields: Fields,
    architecture: str,
    router: RouterSpec,
    *,
    default_length: int,
    default_dense_layers: int,
) -> ModelConfig:
    """The ModelConfig of a decoder with latent attention, whose first layers have no experts.

    Args:
        router: how experts are chosen.
        default_length: max_position_embeddings where config.json has none.
        default_dense_layers: first_k_dense_replace likewise.
    """
    positions = fields.integer("max_position_embeddings", default_length, maximum=MAX_LENGTH)
    attention, max_len = _attention(fields, positions)
    norm = NormSpec("rms", fields.number("rms_norm_eps", 1e-6, maximum=1.0))
    moe = _experts(fields, router)
    mlp = MLPSpec(fields.integer("intermediate_size", maximum=MAX_WIDTH), moe.activation)  # type: ignore[arg-type]
    dense = fields.integer("first_k_dense_replace", default_dense_layers, minimum=0)
    every = fields.integer("moe_layer_freq", 1)
    layers = (
        LayerSpec(attention, mlp if index < dense or index % every else moe, norm)
        for index in range(_llama_like.num_layers(fields))
    )
    hidden = fields.integer("hidden_size", maximum=MAX_WIDTH)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=min(max_len, MAX_LENGTH),
        layers=tuple(layers),
        final_norm=norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        embedding_size=hidden,
        dtype=_llama_like.dtype(fields),
    )


def router(
    fields: Fields,
    *,
    grouped: bool,
    default_scale: float,
    scores: Literal["softmax", "sigmoid"],
    normalize: bool = False,
    correction: bool = False,
    group_score: Literal["max", "top2"] = "max",
) -> RouterSpec:
    """How experts are chosen, see RouterSpec.

    Args:
        grouped: among those of the best "topk_group" of "n_group" groups.
        default_scale: routed_scaling_factor where config.json has none.
    """
    experts = fields.integer("n_routed_experts", maximum=_moe.MAX_EXPERTS)
    groups = top_groups = 1
    if grouped:
        groups = fields.integer("n_group", maximum=experts)
        if experts % groups or (group_score == "top2" and groups > 1 and experts < 2 * groups):
            raise fields.wrong("n_group", f"to divide n_routed_experts={experts} into groups")
        top_groups = fields.integer("topk_group", maximum=groups)
    return RouterSpec(
        top_k=fields.integer("num_experts_per_tok", maximum=top_groups * (experts // groups)),
        scores=scores,
        normalize=normalize,
        scale=fields.number("routed_scaling_factor", default_scale),
        correction=correction,
        groups=groups,
        top_groups=top_groups,
        group_score=group_score,
    )


def _experts(fields: Fields, router: RouterSpec) -> MoESpec:
    width = fields.integer("moe_intermediate_size", maximum=MAX_WIDTH)
    shared = width * fields.integer("n_shared_experts", maximum=MAX_WIDTH)
    activation = fields.choice("hidden_act", ACTIVATIONS, "silu")
    return MoESpec(
        num_experts=fields.integer("n_routed_experts", maximum=_moe.MAX_EXPERTS),
        intermediate_size=width,
        router=router,
        activation=activation,  # type: ignore[arg-type]
        shared=MLPSpec(shared, activation),  # type: ignore[arg-type]
    )


def _attention(fields: Fields, positions: int) -> tuple[LatentAttentionSpec, int]:
    """The attention of every layer, and the longest sequence that its rope allows."""
    heads = fields.integer("num_attention_heads", maximum=MAX_WIDTH)
    if fields.integer("num_key_value_heads", heads) != heads:
        raise UnsupportedModelError(
            f"{fields.where}: num_key_value_heads other than num_attention_heads={heads} is not "
            "supported: latent attention makes a key for every head."
        )
    nope, rope_size = (
        fields.integer(key, maximum=MAX_WIDTH) for key in ("qk_nope_head_dim", "qk_rope_head_dim")
    )
    rope, max_len = _rope.read(fields, rope_size, positions)
    return LatentAttentionSpec(
        num_heads=heads,
        latent_size=fields.integer("kv_lora_rank", maximum=MAX_WIDTH),
        nope_size=nope,
        rope_size=rope_size,
        value_size=fields.integer("v_head_dim", maximum=MAX_WIDTH),
        scale=(nope + rope_size) ** -0.5 * _score_growth(fields, rope),
        rope=rope,
        norm=LATENT_NORM,
        query_latent_size=fields.integer(
            "q_lora_rank", None if "q_lora_rank" in fields.values else 1536, maximum=MAX_WIDTH
        ),
        bias=fields.boolean("attention_bias", False),
    ), max_len


def _score_growth(fields: Fields, rope: RopeSpec) -> float:
    """How scaled rope multiplies the scores besides: YaRN's magnitude of "mscale_all_dim", once
    for queries and once for keys, as in transformers' yarn_apply_mscale."""
    settings = fields.section("rope_scaling") or fields.section("rope_parameters")
    if settings is None or rope.scaling is None:
        return 1.0
    all_dim = settings.number("mscale_all_dim", 0.0, or_zero=True)
    return _rope.magnitude(rope.scaling.factor, 0.1 * all_dim) ** 2


# --- weights --------------------------------------------------------------------------------------


def layout(config: ModelConfig, dropped: tuple[str, ...] = ()) -> Layout:
    """The renaming rules; ``dropped`` are patterns of tensors that the family doesn't need."""
    base = _moe.with_qwen_rules(_llama_like.LAYOUT)
    spec = config.layers[0].attention
    assert isinstance(spec, LatentAttentionSpec)
    rules = (*base.rules, *_expert_rules(), *_attention_rules(spec))
    return dataclasses.replace(base, rules=rules, dropped=base.dropped + dropped)


def _expert_rules() -> tuple[Rule, ...]:
    here = "layers/{i}/ffn/"
    gate_up = (f"{SHARED}gate_proj.weight", f"{SHARED}up_proj.weight")
    return (
        Rule(f"{here}router_correction", ("layers.{i}.mlp.gate.e_score_correction_bias",)),
        Rule(f"{here}shared/up", gate_up, stack_parts),
        Rule(f"{here}shared/down", (f"{SHARED}down_proj.weight",)),
    )


def _attention_rules(spec: LatentAttentionSpec) -> tuple[Rule, ...]:
    here, there = "layers/{i}/attention/", "layers.{i}.self_attn."
    queries = functools.partial(_queries, rope_size=spec.rope_size)
    latents = functools.partial(_latents, rope_size=spec.rope_size)
    keys = functools.partial(_keys_or_values, parts=(spec.nope_size, spec.value_size), which=0)
    values = functools.partial(_keys_or_values, parts=(spec.nope_size, spec.value_size), which=1)
    return (
        Rule(f"{here}q", (f"{there}q_proj.weight",), queries),
        Rule(f"{here}q_down", (f"{there}q_a_proj.weight",)),
        Rule(f"{here}q_down_bias", (f"{there}q_a_proj.bias",)),
        Rule(f"{here}q_norm/scale", (f"{there}q_a_layernorm.weight",)),
        Rule(f"{here}q_up", (f"{there}q_b_proj.weight",), queries),
        Rule(f"{here}kv_down", (f"{there}kv_a_proj_with_mqa.weight",), latents),
        Rule(f"{here}kv_down_bias", (f"{there}kv_a_proj_with_mqa.bias",), latents),
        Rule(f"{here}kv_norm/scale", (f"{there}kv_a_layernorm.weight",)),
        Rule(f"{here}k_up", (f"{there}kv_b_proj.weight",), keys),
        Rule(f"{here}v_up", (f"{there}kv_b_proj.weight",), values),
    )


def _queries(sources: tuple[Source, ...], param: Param, rope_size: int) -> Lazy:
    """[heads * size, inputs] -> [heads, size, inputs], rotated dimensions in half-split order."""
    heads, size, inputs = param.shape
    whole = sources[0].expect(heads * size, inputs).reshape(*param.shape)
    return _half_split_tail(whole, 1, rope_size)


def _latents(sources: tuple[Source, ...], param: Param, rope_size: int) -> Lazy:
    """[latent + rope_size, ...] with the rotated key's rows in half-split order."""
    return _half_split_tail(sources[0].expect(*param.shape), 0, rope_size)


def _half_split_tail(array: Lazy, axis: int, rotary_size: int) -> Lazy:
    """``half_split`` of the last entries of an axis."""
    start = array.shape[axis] - rotary_size
    tail = half_split(_part(array, axis, start, start + rotary_size), axis, rotary_size)
    return concatenate([_part(array, axis, 0, start), tail], axis)


def _part(array: Lazy, axis: int, start: int, stop: int) -> Lazy:
    index = [slice(None)] * len(array.shape)
    index[axis] = slice(start, stop)
    return array[tuple(index)]


def _keys_or_values(
    sources: tuple[Source, ...], param: Param, parts: tuple[int, int], which: int
) -> Lazy:
    """Of [heads * (keys' size + values' size), latent] the ones or the others, [heads, size,
    latent]."""
    heads, _, latent = param.shape
    both = sum(parts)
    whole = sources[0].expect(heads * both, latent).reshape(heads, both, latent)
    return _part(whole, 1, 0, parts[0]) if which == 0 else _part(whole, 1, parts[0], both)
