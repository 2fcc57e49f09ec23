"""OPT: learned positions, LayerNorm, ReLU, biases; opt-350m norms after each half instead."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from converters.families._gpt_like import linear, norm
from converters.families._llama_like import ACTIVATIONS, MAX_LENGTH, MAX_VOCAB, MAX_WIDTH
from converters.rules import Layout, Rule, fuse_qkv, split_inputs, stack_parts
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    LearnedPositions,
    MLPSpec,
    ModelConfig,
    NormSpec,
)

ARCHITECTURES = ("OPTForCausalLM",)
POSITION_OFFSET = 2  # the first two rows of the table belonged to padding in fairseq


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_opt.py and modeling_opt.py."""
    fields = _llama_like.open_config(hf)
    if not fields.boolean("layer_norm_elementwise_affine", True):
        raise UnsupportedModelError(
            f"{fields.where}: layer_norm_elementwise_affine=false is not supported."
        )
    query, kv, size = _llama_like.heads(fields)
    hidden = fields.integer("hidden_size", maximum=MAX_WIDTH)
    bias = fields.boolean("enable_bias", True)
    norm_before = fields.boolean("do_layer_norm_before", True)
    layer_norm = NormSpec("layer", 1e-5)
    attention = AttentionSpec(
        num_heads=query,
        num_kv_heads=kv,
        head_size=size,
        scale=size**-0.5,
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = MLPSpec(
        fields.integer("ffn_dim", maximum=MAX_WIDTH),
        fields.choice("activation_function", ACTIVATIONS, "relu"),  # type: ignore[arg-type]
        gated=False,
        up_bias=bias,
        down_bias=bias,
    )
    layer = LayerSpec(attention, mlp, layer_norm, "pre" if norm_before else "post")
    without_final_norm = fields.boolean("_remove_final_layer_norm", False)
    positions = fields.integer("max_position_embeddings", 2048, maximum=MAX_LENGTH)
    return ModelConfig(
        architecture=ARCHITECTURES[0],
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=positions,
        layers=(layer,) * _llama_like.num_layers(fields),
        final_norm=layer_norm if norm_before and not without_final_norm else None,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        embedding_size=fields.integer("word_embed_proj_dim", hidden, maximum=MAX_WIDTH),
        learned_positions=LearnedPositions(positions, POSITION_OFFSET),
        dtype=_llama_like.dtype(fields),
    )


def _layer_rules() -> tuple[Rule, ...]:
    attention = "layers.{i}.self_attn."
    qkv = [f"{attention}{part}_proj" for part in "qkv"]
    here = "layers/{i}/"
    return (
        *norm(f"{here}attention_norm", f"{attention[:-1]}_layer_norm"),
        Rule(f"{here}attention/qkv", tuple(f"{name}.weight" for name in qkv), fuse_qkv),
        Rule(f"{here}attention/qkv_bias", tuple(f"{name}.bias" for name in qkv), fuse_qkv),
        *linear(f"{here}attention/out", f"{attention}out_proj", split_inputs),
        *norm(f"{here}ffn_norm", "layers.{i}.final_layer_norm"),
        *linear(f"{here}ffn/up", "layers.{i}.fc1", stack_parts, stack_parts),
        *linear(f"{here}ffn/down", "layers.{i}.fc2"),
    )


LAYOUT = Layout(
    rules=(
        Rule("embed/tokens", ("embed_tokens.weight",)),
        Rule("embed/positions", ("embed_positions.weight",)),
        Rule("embed/project_in", ("project_in.weight",)),
        *_layer_rules(),
        *norm("head/norm", "final_layer_norm"),
        Rule("head/project_out", ("project_out.weight",)),
        Rule("head/tokens", ("lm_head.weight",)),
    ),
    prefixes=("model.decoder.", "decoder."),
    dropped=("version",),
    dropped_if_tied=("lm_head.weight",),
)
