"""BLOOM and BLOOMZ: ALiBi, LayerNorm (also of the embeddings), biases."""

from __future__ import annotations

from typing import Any

from converters.families import _gpt_like, _llama_like
from converters.families._llama_like import MAX_LAYERS, MAX_VOCAB
from converters.rules import Layout, Rule
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig

ARCHITECTURES = ("BloomForCausalLM",)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_bloom.py and modeling_bloom.py."""
    fields = _llama_like.open_config(hf)
    if fields.boolean("apply_residual_connection_post_layernorm", False):
        raise UnsupportedModelError(
            f"{fields.where}: apply_residual_connection_post_layernorm is not supported."
        )
    hidden, heads, size = _gpt_like.sizes(
        fields,
        fields.named("n_embed", "hidden_size"),
        fields.named("n_head", "num_attention_heads"),
    )
    layer_norm = _gpt_like.layer_norm(fields)
    attention = AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads,
        head_size=size,
        scale=size**-0.5,
        qkv_bias=True,
        out_bias=True,
        alibi=True,
    )
    mlp = MLPSpec(4 * hidden, "gelu_tanh", gated=False, up_bias=True, down_bias=True)
    count = fields.integer(fields.named("n_layer", "num_hidden_layers"), maximum=MAX_LAYERS)
    return ModelConfig(
        architecture=ARCHITECTURES[0],
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=_gpt_like.length(fields, "seq_length", 2048),
        layers=(LayerSpec(attention, mlp, layer_norm),) * count,
        final_norm=layer_norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        embedding_size=hidden,
        embedding_norm=layer_norm,
        dtype=_llama_like.dtype(fields),
    )


LAYOUT = Layout(
    rules=(
        Rule("embed/tokens", ("word_embeddings.weight",)),
        *_gpt_like.norm("embed/norm", "word_embeddings_layernorm"),
        *_gpt_like.megatron_layer("input_layernorm", "post_attention_layernorm"),
        *_gpt_like.norm("head/norm", "ln_f"),
        Rule("head/tokens", ("lm_head.weight",)),
    ),
    prefixes=("transformer.",),
    dropped_if_tied=("lm_head.weight",),
)
