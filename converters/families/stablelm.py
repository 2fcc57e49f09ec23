"""StableLM 3B and StableLM 2: Llama, with LayerNorm and a partial rope; 12B in parallel halves."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like, _rope
from converters.families._llama_like import ACTIVATIONS, MAX_LENGTH, MAX_VOCAB, MAX_WIDTH
from converters.lazy import Lazy, concatenate, stack
from converters.rules import Layout, Rule, Source
from jaxserve.model.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig, NormSpec
from jaxserve.model.params import Param

ARCHITECTURES = ("StableLmForCausalLM",)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_stablelm.py and modeling_stablelm.py."""
    fields = _llama_like.open_config(hf)
    query, kv, size = _llama_like.heads(fields)
    positions = fields.integer("max_position_embeddings", 4096, maximum=MAX_LENGTH)
    rope, max_len = _rope.read(fields, size, positions, default_partial=0.25)
    eps = fields.number("layer_norm_eps", 1e-5, maximum=1.0)
    norm = NormSpec("layer", eps)
    per_head = fields.boolean("qk_layernorm", False)
    attention = AttentionSpec(
        num_heads=query,
        num_kv_heads=kv,
        head_size=size,
        scale=size**-0.5,
        rope=rope,
        qkv_bias=fields.boolean("use_qkv_bias", False),
        qk_norm=NormSpec("layer", eps, bias=False) if per_head else None,
    )
    mlp = MLPSpec(
        fields.integer("intermediate_size", maximum=MAX_WIDTH),
        fields.choice("hidden_act", ACTIVATIONS, "silu"),  # type: ignore[arg-type]
    )
    parallel = fields.boolean("use_parallel_residual", False)
    layer = LayerSpec(attention, mlp, norm, parallel="one_norm" if parallel else None)
    hidden = fields.integer("hidden_size", maximum=MAX_WIDTH)
    return ModelConfig(
        architecture=ARCHITECTURES[0],
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=min(max_len, MAX_LENGTH),
        layers=(layer,) * _llama_like.num_layers(fields),
        final_norm=norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        embedding_size=hidden,
        dtype=_llama_like.dtype(fields),
    )


def _stack_head_norms(sources: tuple[Source, ...], param: Param) -> Lazy:
    """Scales [D] of all query heads, then of all key heads -> [kv_heads, group + 1, D]."""
    kv_heads, parts, size = param.shape
    scales = stack([source.expect(size) for source in sources])
    heads = kv_heads * (parts - 1)
    queries = scales[(slice(0, heads), slice(None))].reshape(kv_heads, parts - 1, size)
    keys = scales[(slice(heads, len(sources)), slice(None))].reshape(kv_heads, 1, size)
    return concatenate([queries, keys], 1)


def layout(config: ModelConfig) -> Layout:
    """Llama's names, biases of the norms, and a norm per head, each a tensor of its own."""
    attention = config.layers[0].attention
    heads = {"q": attention.num_heads, "k": attention.num_kv_heads}
    norms = tuple(
        f"layers.{{i}}.self_attn.{part}_layernorm.norms.{head}.weight"
        for part, count in heads.items()
        for head in range(count)
    )
    plain = _llama_like.LAYOUT
    return Layout(
        rules=(
            *plain.rules,
            Rule("layers/{i}/attention_norm/bias", ("layers.{i}.input_layernorm.bias",)),
            Rule("layers/{i}/attention/qk_norm/scale", norms, _stack_head_norms),
            Rule("layers/{i}/ffn_norm/bias", ("layers.{i}.post_attention_layernorm.bias",)),
            Rule("head/norm/bias", ("norm.bias",)),
        ),
        prefixes=plain.prefixes,
        dropped=plain.dropped,
        dropped_if_tied=plain.dropped_if_tied,
    )
