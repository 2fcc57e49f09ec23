"""Falcon: both halves of a layer in parallel, few KV heads, rope; or as falcon-rw, with ALiBi."""

from __future__ import annotations

from typing import Any, Literal

from converters.families import _gpt_like, _llama_like, _rope
from converters.families._llama_like import ACTIVATIONS, MAX_VOCAB, MAX_WIDTH
from converters.fields import Fields
from converters.rules import Layout, Rule
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.model.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig

ARCHITECTURES = ("FalconForCausalLM",)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_falcon.py and modeling_falcon.py.

    ALiBi's bias is added before the scores are scaled, so it is scaled with them. transformers
    rounds the bias slope * position to bfloat16, whatever the model's dtype; here it is exact.
    """
    fields = _llama_like.open_config(hf)
    hidden, heads, size = _gpt_like.sizes(
        fields, fields.named("n_embed", "hidden_size"), "num_attention_heads"
    )
    max_len = _gpt_like.length(fields, "max_position_embeddings", 2048)
    alibi, rope = fields.boolean("alibi", False), None
    if not alibi:
        rope, max_len = _rope.read(fields, size, max_len)
    bias = fields.boolean("bias", False)
    layer_norm = _gpt_like.layer_norm(fields)
    attention = AttentionSpec(
        num_heads=heads,
        num_kv_heads=_num_kv_heads(fields, heads),
        head_size=size,
        scale=size**-0.5,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        alibi=alibi,
        alibi_scale=size**-0.5,
    )
    mlp = MLPSpec(
        fields.integer("ffn_hidden_size", 4 * hidden, maximum=MAX_WIDTH),
        fields.choice("activation", ACTIVATIONS, "gelu"),  # type: ignore[arg-type]
        gated=False,
        up_bias=bias,
        down_bias=bias,
    )
    layer = LayerSpec(attention, mlp, layer_norm, parallel=_parallel(fields))
    return ModelConfig(
        architecture=ARCHITECTURES[0],
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=max_len,
        layers=(layer,) * _llama_like.num_layers(fields),
        final_norm=layer_norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        embedding_size=hidden,
        dtype=_llama_like.dtype(fields),
    )


def _num_kv_heads(fields: Fields, heads: int) -> int:
    """Only the new architecture (40B, 180B, 11B) has a number of its own."""
    if not fields.boolean("new_decoder_architecture", False):
        return 1 if fields.boolean("multi_query", True) else heads
    kv = fields.integer("num_kv_heads", heads, maximum=MAX_WIDTH)
    if heads % kv:
        raise CheckpointError(
            f"{fields.where}: num_attention_heads={heads} is no multiple of num_kv_heads={kv}."
        )
    return kv


def _parallel(fields: Fields) -> Literal["one_norm", "two_norms"] | None:
    parallel = fields.boolean("parallel_attn", True)
    if not fields.boolean("new_decoder_architecture", False):
        return "one_norm" if parallel else None
    if not parallel:
        raise UnsupportedModelError(
            f"{fields.where}: parallel_attn=false is not supported with new_decoder_architecture."
        )
    norms = fields.integer("num_ln_in_parallel_attn", 2, maximum=2)
    return "two_norms" if norms == 2 else "one_norm"


def layout(config: ModelConfig) -> Layout:
    """The norms' names depend on how many there are."""
    names = ("input_layernorm", "post_attention_layernorm")
    if config.layers[0].parallel == "two_norms":
        names = ("ln_attn", "ln_mlp")
    return Layout(
        rules=(
            Rule("embed/tokens", ("word_embeddings.weight",)),
            *_gpt_like.megatron_layer(*names),
            *_gpt_like.norm("head/norm", "ln_f"),
            Rule("head/tokens", ("lm_head.weight",)),
        ),
        prefixes=("transformer.",),
        dropped=("h.*.self_attention.rotary_emb.inv_freq",),
        dropped_if_tied=("lm_head.weight",),
    )
