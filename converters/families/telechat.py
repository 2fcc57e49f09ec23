"""TeleChat and TeleChat2: Llama, with fused keys and values, and biases after each half."""

from __future__ import annotations

import math
from typing import Any

from converters.families import _llama_like
from converters.families._llama_like import MAX_LENGTH, MAX_VOCAB, MAX_WIDTH
from converters.fields import Fields
from converters.lazy import Lazy, concatenate
from converters.rules import Layout, Rule, Source, split_inputs, stack_parts
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from jaxserve.model.params import Param

ARCHITECTURES = (
    *("TeleChat2ForCausalLM", "Telechat2ForCausalLM"),
    *("TeleChatForCausalLM", "TelechatForCausalLM"),
)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See configuration_telechat(2).py and modeling_telechat(2).py of Tele-AI's repositories.
    "logn" and "flash_attn" stand in configs, but change nothing that the models compute."""
    fields = _llama_like.open_config(hf)
    fields.reject(("num_moe_experts",), "TeleChat2's mixtures of experts are not supported.")
    if fields.boolean("apply_residual_connection_post_layernorm", False):
        raise UnsupportedModelError(
            f"{fields.where}: apply_residual_connection_post_layernorm=true is not supported."
        )
    hidden = fields.integer("hidden_size", maximum=MAX_WIDTH)
    query = fields.integer("n_head", maximum=MAX_WIDTH)
    kv = fields.integer("num_key_value_heads", query, maximum=MAX_WIDTH)
    if hidden % query or query % kv:
        raise CheckpointError(
            f"{fields.where}: hidden_size={hidden} must be a multiple of n_head={query}, and that "
            f"of num_key_value_heads={kv}."
        )
    size = hidden // query
    tied = fields.boolean("tie_word_embeddings", True)
    length = fields.integer("training_seqlen", 8192, maximum=MAX_LENGTH)
    norm = NormSpec("rms", fields.number("layer_norm_epsilon", 1e-5, maximum=1.0))
    attention = AttentionSpec(
        num_heads=query,
        num_kv_heads=kv,
        head_size=size,
        scale=size**-0.5,
        rope=_rope(fields, size, length, tied),
        out_bias=True,
    )
    width = fields.integer("ffn_hidden_size", maximum=MAX_WIDTH)
    layer = LayerSpec(attention, MLPSpec(width, "silu", down_bias=True), norm)
    return ModelConfig(
        architecture=ARCHITECTURES[0],
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=length,
        layers=(layer,) * fields.integer("n_layer", maximum=_llama_like.MAX_LAYERS),
        final_norm=norm,
        tie_word_embeddings=tied,
        embedding_size=hidden,
        embedding_norm=norm if fields.boolean("embed_layernorm", False) else None,
        dtype=_llama_like.dtype(fields, "bfloat16"),
    )


def _rope(fields: Fields, head_size: int, length: int, tied: bool) -> RopeSpec:
    """NTK-aware scaling from base_seqlen to training_seqlen, which every sequence up to the latter
    has; longer ones, which the models' own code goes on stretching, are not offered.

    TeleChat's configs have no base_seqlen, it stands in their code: 4096 in TeleChat-7B, the only
    one with tied embeddings, and 8192 in the others.
    """
    if head_size % 2 or head_size < 4:
        raise CheckpointError(
            f"{fields.where}: hidden_size / n_head is {head_size}; expected an even number, 4 or "
            "more."
        )
    base = fields.integer("base_seqlen", 4096 if tied else 8192, maximum=MAX_LENGTH)
    growth = max(2 ** math.ceil(math.log2(length / base) + 1) - 1, 1)
    return RopeSpec(10000.0 * growth ** (head_size / (head_size - 2)), head_size)


def _fuse_query_key_value(sources: tuple[Source, ...], param: Param) -> Lazy:
    """q [heads * D, hidden], and [kv_heads * 2 * D, hidden] with each head's key before its value
    -> [kv_heads, group + 2, D, hidden]."""
    kv_heads, parts, size, hidden = param.shape
    q, kv = (
        source.expect(kv_heads * heads * size, hidden).reshape(kv_heads, heads, size, hidden)
        for source, heads in zip(sources, (parts - 2, 2), strict=True)
    )
    return concatenate([q, kv], 1)


def _layer_rules() -> tuple[Rule, ...]:
    attention, mlp, here = "h.{i}.self_attention.", "h.{i}.mlp.", "layers/{i}/"
    qkv = (f"{attention}query.weight", f"{attention}key_value.weight")
    gate_up = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
    return (
        Rule(f"{here}attention_norm/scale", ("h.{i}.input_layernorm.weight",)),
        Rule(f"{here}attention/qkv", qkv, _fuse_query_key_value),
        Rule(f"{here}attention/out", (f"{attention}dense.weight",), split_inputs),
        Rule(f"{here}attention/out_bias", (f"{attention}dense.bias",)),
        Rule(f"{here}ffn_norm/scale", ("h.{i}.post_attention_layernorm.weight",)),
        Rule(f"{here}ffn/up", gate_up, stack_parts),
        Rule(f"{here}ffn/down", (f"{mlp}down_proj.weight",)),
        Rule(f"{here}ffn/down_bias", (f"{mlp}down_proj.bias",)),
    )


LAYOUT = Layout(
    rules=(
        Rule("embed/tokens", ("word_embeddings.weight",)),
        Rule("embed/norm/scale", ("word_embeddings_layernorm.weight",)),
        *_layer_rules(),
        Rule("head/norm/scale", ("ln_f.weight",)),
        Rule("head/tokens", ("lm_head.weight",)),
    ),
    prefixes=("transformer.",),
    dropped=("*.rotary_emb.inv_freq",),
    dropped_if_tied=("lm_head.weight",),
)
