"""ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4-9B as first published, with code of their own."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from converters.families._llama_like import MAX_LAYERS, MAX_LENGTH, MAX_VOCAB, MAX_WIDTH
from converters.fields import Fields
from converters.rules import (
    Layout,
    Rule,
    rotated_in_halves,
    same,
    split_inputs,
    split_parts,
    split_qkv,
)
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    NormSpec,
    RopeScaling,
    RopeSpec,
)

ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
CHATGLM3_VOCAB, CHATGLM3_ENDS = 65024, (64795, 64797)
GLM_4_VOCAB = 151552
NEEDED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
    "tie_word_embeddings": False,
    "interleaved_qkv": False,
}
"""What the published models have; other values would be other arithmetic. All may be absent but
multi_query_attention, whose absence means false."""


def config(hf: dict[str, Any]) -> ModelConfig:
    """See configuration_chatglm.py and modeling_chatglm.py of THUDM/chatglm3-6b and
    THUDM/glm-4-9b-chat. The first half of each head is rotated."""
    fields = _llama_like.open_config(hf)
    _check(fields)
    hidden = fields.integer("hidden_size", maximum=MAX_WIDTH)
    query = fields.integer("num_attention_heads", maximum=MAX_WIDTH)
    kv = fields.integer("multi_query_group_num", 1, maximum=MAX_WIDTH)
    if query % kv:
        raise CheckpointError(
            f"{fields.where}: num_attention_heads={query} is no multiple of "
            f"multi_query_group_num={kv}."
        )
    size = fields.integer("kv_channels", 128, maximum=MAX_WIDTH)
    if size % 4:
        raise fields.wrong("kv_channels", "a multiple of 4, half of which are rotated in pairs")
    bias = fields.boolean("add_bias_linear", False)
    norm = NormSpec("rms", fields.number("layernorm_epsilon", 1e-5, maximum=1.0))
    attention = AttentionSpec(
        num_heads=query,
        num_kv_heads=kv,
        head_size=size,
        scale=size**-0.5,
        rope=_rope(fields, size // 2),
        qkv_bias=bias or fields.boolean("add_qkv_bias", False),
        out_bias=bias,
    )
    ffn = fields.integer("ffn_hidden_size", 13696, maximum=MAX_WIDTH)
    layer = LayerSpec(attention, MLPSpec(ffn, "silu", up_bias=bias, down_bias=bias), norm)
    return ModelConfig(
        architecture=ARCHITECTURES[0],
        vocab_size=fields.integer("padded_vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=fields.integer("seq_length", 2048, maximum=MAX_LENGTH),
        layers=(layer,) * fields.integer("num_layers", maximum=MAX_LAYERS),
        final_norm=norm,
        tie_word_embeddings=False,
        embedding_size=hidden,
        dtype=_llama_like.dtype(fields, "float16"),
    )


def _rope(fields: Fields, size: int) -> RopeSpec:
    """The rotation of ``size`` features. ChatGLM2 divides the positions by rope_ratio, ChatGLM3 and
    later multiply the base 10000 by it (modeling_chatglm.py of THUDM/chatglm2-6b-32k and
    THUDM/chatglm3-6b-32k). The two have the same keys and sizes: only their names differ.

    Raises:
        UnsupportedModelError: it may be either, and rope_ratio is not 1.
    """
    ratio = fields.number("rope_ratio", 1.0)
    later = RopeSpec(10000.0 * ratio, size)
    if ratio == 1.0 or fields.integer("padded_vocab_size") >= GLM_4_VOCAB:
        return later
    name = str(fields.values.get("_name_or_path")).lower()
    two, three = "chatglm2" in name, "chatglm3" in name
    if two == three:
        raise UnsupportedModelError(
            f"{fields.where}: rope_ratio={ratio:g} divides positions in ChatGLM2 and multiplies "
            "the rope's base in ChatGLM3, and nothing here tells which of them this is; set "
            '_name_or_path to "THUDM/chatglm2-6b-32k" or "THUDM/chatglm3-6b-32k".'
        )
    if three:
        return later
    length = fields.integer("seq_length", 2048, maximum=MAX_LENGTH)
    return RopeSpec(10000.0, size, RopeScaling("linear", ratio, max(int(length / ratio), 1)))


def _check(fields: Fields) -> None:
    """Refuses what the published models of this family don't have.

    Raises:
        UnsupportedModelError: there is a feature, or another model of the same model_type.
    """
    fields.reject(
        ("position_encoding_2d",),
        "ChatGLM-6B, whose prompts are read in both directions, is not supported; use ChatGLM2 or "
        "later.",
    )
    fields.reject(("vision_config",), "models that read images are not supported.")
    fields.reject(("pre_seq_len",), "learned prefixes (P-Tuning) are not supported.")
    if fields.integer("quantization_bit", 0, minimum=0):
        raise UnsupportedModelError(
            f"{fields.where}: quantization_bit is set, but quantized checkpoints are not supported "
            "yet; use the model's unquantized checkpoint."
        )
    for key, needed in NEEDED.items():
        if fields.boolean(key, needed if key != "multi_query_attention" else False) != needed:
            value, other = str(not needed).lower(), str(needed).lower()
            raise UnsupportedModelError(
                f"{fields.where}: {key}={value} is not supported; only {other} is."
            )
    if fields.number("rotary_percent", 0.5) != 0.5:
        raise UnsupportedModelError(
            f"{fields.where}: rotary_percent other than 0.5 is not supported."
        )


def end_tokens(config: ModelConfig, generation: Fields, ids: tuple[int, ...]) -> tuple[int, ...]:
    """ChatGLM3 ends its turns with <|user|> or <|observation|>, which its files don't list (but its
    ``chat``). ChatGLM2 has the same vocabulary and never makes these tokens."""
    return CHATGLM3_ENDS if config.vocab_size == CHATGLM3_VOCAB else ()


def layout(config: ModelConfig) -> Layout:
    """Fused queries, keys and values, fused gate and up; rotated pairs (2i, 2i + 1)."""
    here, there = "layers/{i}/", "encoder.layers.{i}."
    qkv = rotated_in_halves(split_qkv, config.rope_specs[0].rotary_size)
    linear = (
        ("attention/qkv", "self_attention.query_key_value", qkv, qkv),
        ("attention/out", "self_attention.dense", split_inputs, same),
        ("ffn/up", "mlp.dense_h_to_4h", split_parts, split_parts),
        ("ffn/down", "mlp.dense_4h_to_h", same, same),
    )
    rules = [
        Rule("embed/tokens", ("embedding.word_embeddings.weight",)),
        Rule(f"{here}attention_norm/scale", (f"{there}input_layernorm.weight",)),
        Rule(f"{here}ffn_norm/scale", (f"{there}post_attention_layernorm.weight",)),
        Rule("head/norm/scale", ("encoder.final_layernorm.weight",)),
        Rule("head/tokens", ("output_layer.weight",)),
    ]
    for target, source, weight, bias in linear:
        rules.append(Rule(f"{here}{target}", (f"{there}{source}.weight",), weight))
        rules.append(Rule(f"{here}{target}_bias", (f"{there}{source}.bias",), bias))
    return Layout(tuple(rules), ("transformer.",), ("rotary_pos_emb.inv_freq",))
