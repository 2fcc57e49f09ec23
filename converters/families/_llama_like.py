"""What Llama and its near twins share: the reading of config.json and the tensor names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from converters.families import _rope
from converters.fields import Fields
from converters.files import preview
from converters.rules import Layout, Rule, fuse_qkv, split_inputs, stack_parts
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.model.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig, NormSpec

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}
SLIDING = "sliding_attention"
MAX_LAYERS = 4096
MAX_WIDTH = 2**20
MAX_VOCAB = 2**24
MAX_LENGTH = 2**27


def open_config(hf: dict[str, Any], quant_method: str | None = None) -> Fields:
    """The fields of a config.json, once it is known to describe plain weights, or ones quantized by
    the one method that the family reads."""
    fields = Fields(hf, "config.json")
    section = fields.section("quantization_config")
    readable = section is not None and section.values.get("quant_method") == quant_method
    fields.reject(
        ("compression_config",) if readable else ("quantization_config", "compression_config"),
        "quantized checkpoints are not supported yet; use the model's unquantized checkpoint.",
    )
    return fields


def num_layers(fields: Fields) -> int:
    """Number of decoder layers."""
    return fields.integer("num_hidden_layers", maximum=MAX_LAYERS)


def dtype(fields: Fields, default: str = "float32") -> str:
    """The checkpoint's own dtype: "dtype" since transformers 5, "torch_dtype" before."""
    return fields.choice("dtype" if "dtype" in fields else "torch_dtype", DTYPES, default)


def heads(fields: Fields, default_head_size: int | None = None) -> tuple[int, int, int]:
    """Numbers of query heads and of KV heads, and the head size."""
    hidden = fields.integer("hidden_size", maximum=MAX_WIDTH)
    query = fields.integer("num_attention_heads", maximum=MAX_WIDTH)
    kv = fields.integer("num_key_value_heads", query, maximum=MAX_WIDTH)
    if query % kv:
        raise CheckpointError(
            f"{fields.where}: num_attention_heads={query} is no multiple of "
            f"num_key_value_heads={kv}."
        )
    size = fields.integer("head_dim", default_head_size, maximum=MAX_WIDTH)
    if size is None and hidden % query:
        raise CheckpointError(
            f"{fields.where}: hidden_size={hidden} is no multiple of num_attention_heads={query}, "
            "and there is no head_dim."
        )
    return query, kv, size if size is not None else hidden // query


def layer_types(fields: Fields) -> list[str] | None:
    """Which layers attend to everything and which within a window, if "layer_types" says so."""
    count = num_layers(fields)
    types = fields.words("layer_types")
    if types is None:
        return None
    if len(types) != count:
        raise fields.wrong("layer_types", f"one entry for each of {count} layers")
    unknown = sorted(set(types) - {"full_attention", SLIDING})
    if unknown:
        raise UnsupportedModelError(
            f"{fields.where}: layer_types has {preview(unknown)}; supported are full_attention, "
            f"{SLIDING}."
        )
    return types


def windows_by_layer(fields: Fields) -> list[int | None]:
    """Sliding windows as Qwen2 and Qwen3 declare them.

    "layer_types" says which layers have one; without it, those from "max_window_layers" on.
    """
    count = num_layers(fields)
    size = None
    if fields.boolean("use_sliding_window", False):
        size = fields.integer("sliding_window", None if "sliding_window" in fields.values else 4096)
    first = fields.integer("max_window_layers", 28, minimum=0)
    types = layer_types(fields)
    if types is None:
        return [size if index >= first else None for index in range(count)]
    if size is None and SLIDING in types:
        raise CheckpointError(
            f"{fields.where}: layer_types has sliding_attention, but use_sliding_window is off or "
            "sliding_window is null."
        )
    return [size if each == SLIDING else None for each in types]


def config(
    fields: Fields,
    architecture: str,
    *,
    default_length: int,
    windows: Sequence[int | None],
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    default_head_size: int | None = None,
    default_theta: float = 10000.0,
    default_eps: float = 1e-6,
    default_partial: float | None = None,
) -> ModelConfig:
    """The ModelConfig of a Llama-like decoder: RMSNorm, rope, grouped queries, gated MLP.

    Args:
        default_length: max_position_embeddings where config.json has none.
        windows: the sliding window of each layer, or None.
        qkv_bias, out_bias, mlp_bias, qk_norm: see AttentionSpec and MLPSpec.
        default_head_size: head_dim where config.json has none; None: hidden_size / heads.
        default_theta, default_eps: rope_theta and rms_norm_eps where config.json has none.
        default_partial: see ``_rope.read``.
    """
    query, kv, size = heads(fields, default_head_size)
    positions = fields.integer("max_position_embeddings", default_length, maximum=MAX_LENGTH)
    rope, max_len = _rope.read(fields, size, positions, default_theta, default_partial)
    norm = NormSpec("rms", fields.number("rms_norm_eps", default_eps, maximum=1.0))
    mlp = MLPSpec(
        fields.integer("intermediate_size", maximum=MAX_WIDTH),
        fields.choice("hidden_act", ACTIVATIONS, "silu"),  # type: ignore[arg-type]
        up_bias=mlp_bias,
        down_bias=mlp_bias,
    )

    def layer(window: int | None) -> LayerSpec:
        attention = AttentionSpec(
            num_heads=query,
            num_kv_heads=kv,
            head_size=size,
            scale=size**-0.5,
            rope=rope,
            sliding_window=window,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=norm if qk_norm else None,
        )
        return LayerSpec(attention, mlp, norm)

    hidden = fields.integer("hidden_size", maximum=MAX_WIDTH)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=min(max_len, MAX_LENGTH),
        layers=tuple(layer(window) for window in windows),
        final_norm=norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        embedding_size=hidden,
        dtype=dtype(fields),
    )


def _layer_rules() -> tuple[Rule, ...]:
    attention, mlp = "layers.{i}.self_attn.", "layers.{i}.mlp."
    qkv = [f"{attention}{part}_proj" for part in "qkv"]
    gate_up = [f"{mlp}gate_proj", f"{mlp}up_proj"]
    here = "layers/{i}/"
    return (
        Rule(f"{here}attention_norm/scale", ("layers.{i}.input_layernorm.weight",)),
        Rule(f"{here}attention/qkv", tuple(f"{name}.weight" for name in qkv), fuse_qkv),
        Rule(f"{here}attention/qkv_bias", tuple(f"{name}.bias" for name in qkv), fuse_qkv),
        Rule(f"{here}attention/q_norm/scale", (f"{attention}q_norm.weight",)),
        Rule(f"{here}attention/k_norm/scale", (f"{attention}k_norm.weight",)),
        Rule(f"{here}attention/out", (f"{attention}o_proj.weight",), split_inputs),
        Rule(f"{here}attention/out_bias", (f"{attention}o_proj.bias",)),
        Rule(f"{here}ffn_norm/scale", ("layers.{i}.post_attention_layernorm.weight",)),
        Rule(f"{here}ffn/up", tuple(f"{name}.weight" for name in gate_up), stack_parts),
        Rule(f"{here}ffn/up_bias", tuple(f"{name}.bias" for name in gate_up), stack_parts),
        Rule(f"{here}ffn/down", (f"{mlp}down_proj.weight",)),
        Rule(f"{here}ffn/down_bias", (f"{mlp}down_proj.bias",)),
    )


LAYOUT = Layout(
    rules=(
        Rule("embed/tokens", ("embed_tokens.weight",)),
        *_layer_rules(),
        Rule("head/norm/scale", ("norm.weight",)),
        Rule("head/tokens", ("lm_head.weight",)),
    ),
    prefixes=("model.",),
    dropped=("*.rotary_emb.inv_freq",),
    dropped_if_tied=("lm_head.weight",),
)
