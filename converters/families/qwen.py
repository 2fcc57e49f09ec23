"""Qwen 1 (Qwen-1.8B to Qwen-72B and their chat models): Llama, with fused projections, rope that
stretches with the prompt and queries that grow with the logarithm of their place."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from converters.families._llama_like import MAX_LENGTH, MAX_VOCAB, MAX_WIDTH
from converters.fields import Fields
from converters.rules import Layout, Rule, split_inputs, split_qkv, stack_parts
from jaxserve.errors import CheckpointError
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    NormSpec,
    RopeScaling,
    RopeSpec,
)

ARCHITECTURES = ("QWenLMHeadModel",)
CHAT_ENDS = (1, 2)
"""<|im_start|> and <|im_end|> follow <|endoftext|>, the only end that generation_config.json
names."""


def config(hf: dict[str, Any]) -> ModelConfig:
    """See configuration_qwen.py and modeling_qwen.py of Qwen/Qwen-7B-Chat."""
    fields = _llama_like.open_config(hf)
    fields.reject(("visual", "audio"), "images and sound are not supported.")
    hidden = fields.integer("hidden_size", maximum=MAX_WIDTH)
    heads = fields.integer("num_attention_heads", maximum=MAX_WIDTH)
    size = fields.integer("kv_channels", 128, maximum=MAX_WIDTH)
    if heads * size != hidden:
        raise fields.wrong("kv_channels", f"hidden_size / num_attention_heads = {hidden}/{heads}")
    width = fields.integer("intermediate_size", maximum=MAX_WIDTH)  # of both its halves together
    length = fields.integer("seq_length", 8192, maximum=MAX_LENGTH)
    longest = fields.integer("max_position_embeddings", length, maximum=MAX_LENGTH)
    dynamic = fields.boolean("use_dynamic_ntk", True)
    bias = not fields.boolean("no_bias", True)
    norm = NormSpec("rms", fields.number("layer_norm_epsilon", 1e-6, maximum=1.0))
    attention = AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads,
        head_size=size,
        scale=size**-0.5,
        rope=_rope(fields, size, RopeScaling("qwen", 1.0, length) if dynamic else None),
        qkv_bias=True,
        out_bias=bias,
        log_length=length if fields.boolean("use_logn_attn", True) else None,
    )
    layer = LayerSpec(attention, MLPSpec(width // 2, "silu", up_bias=bias, down_bias=bias), norm)
    return ModelConfig(
        architecture=ARCHITECTURES[0],
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=max(length, longest) if dynamic else length,
        layers=(layer,) * _llama_like.num_layers(fields),
        final_norm=norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        embedding_size=hidden,
        dtype=_llama_like.dtype(fields, "bfloat16"),
    )


def _rope(fields: Fields, head_size: int, scaling: RopeScaling | None) -> RopeSpec:
    size = int(head_size * fields.number("rotary_pct", 1.0, maximum=1.0))
    if size % 2 or size < 4:
        raise CheckpointError(
            f"{fields.where}: kv_channels * rotary_pct is {size}; expected an even number, 4 or "
            "more."
        )
    return RopeSpec(fields.number("rotary_emb_base", 10000.0, above=1.0), size, scaling)


def end_tokens(config: ModelConfig, generation: Fields, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ends that generation_config.json means besides those it lists (``ids``): chat models end
    a turn with <|im_end|>, and <|im_start|> would begin another (get_stop_words_ids)."""
    if generation.values.get("chat_format") != "chatml" or not ids:
        return ()
    return tuple(ids[0] + after for after in CHAT_ENDS)


def _layer_rules() -> tuple[Rule, ...]:
    attention, mlp, here = "h.{i}.attn.", "h.{i}.mlp.", "layers/{i}/"
    up = [f"{mlp}w2", f"{mlp}w1"]  # the first goes through the activation
    return (
        Rule(f"{here}attention_norm/scale", ("h.{i}.ln_1.weight",)),
        Rule(f"{here}attention/qkv", (f"{attention}c_attn.weight",), split_qkv),
        Rule(f"{here}attention/qkv_bias", (f"{attention}c_attn.bias",), split_qkv),
        Rule(f"{here}attention/out", (f"{attention}c_proj.weight",), split_inputs),
        Rule(f"{here}attention/out_bias", (f"{attention}c_proj.bias",)),
        Rule(f"{here}ffn_norm/scale", ("h.{i}.ln_2.weight",)),
        Rule(f"{here}ffn/up", tuple(f"{name}.weight" for name in up), stack_parts),
        Rule(f"{here}ffn/up_bias", tuple(f"{name}.bias" for name in up), stack_parts),
        Rule(f"{here}ffn/down", (f"{mlp}c_proj.weight",)),
        Rule(f"{here}ffn/down_bias", (f"{mlp}c_proj.bias",)),
    )


LAYOUT = Layout(
    rules=(
        Rule("embed/tokens", ("wte.weight",)),
        *_layer_rules(),
        Rule("head/norm/scale", ("ln_f.weight",)),
        Rule("head/tokens", ("lm_head.weight",)),
    ),
    prefixes=("transformer.",),
    dropped=("*.rotary_emb.inv_freq", "*.masked_bias"),
    dropped_if_tied=("lm_head.weight",),
)
