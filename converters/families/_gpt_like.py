"""What GPT-2 and the families built like it share: LayerNorm, biases, a plain feed-forward."""

from __future__ import annotations

from converters.families._llama_like import MAX_LENGTH, MAX_WIDTH
from converters.fields import Fields
from converters.rules import Rule, Transform, same, split_groups, split_inputs, stack_parts
from jaxserve.errors import CheckpointError
from jaxserve.model.config import NormSpec


def sizes(fields: Fields, hidden_key: str, heads_key: str) -> tuple[int, int, int]:
    """Width, number of query heads, and the head size, which is their quotient.

    Raises:
        CheckpointError: one is missing, or the heads don't divide the width.
    """
    hidden = fields.integer(hidden_key, maximum=MAX_WIDTH)
    heads = fields.integer(heads_key, maximum=MAX_WIDTH)
    if hidden % heads:
        raise CheckpointError(
            f"{fields.where}: {hidden_key}={hidden} is no multiple of {heads_key}={heads}."
        )
    return hidden, heads, hidden // heads


def length(fields: Fields, key: str, default: int) -> int:
    """The longest sequence in tokens."""
    return fields.integer(key, default, maximum=MAX_LENGTH)


def layer_norm(fields: Fields) -> NormSpec:
    """LayerNorm with a bias."""
    return NormSpec("layer", fields.number("layer_norm_epsilon", 1e-5, maximum=1.0))


def norm(target: str, source: str) -> tuple[Rule, ...]:
    """The rules of a LayerNorm's scale and bias."""
    return Rule(f"{target}/scale", (f"{source}.weight",)), Rule(
        f"{target}/bias", (f"{source}.bias",)
    )


def linear(
    target: str, source: str, weight: Transform = same, bias: Transform = same
) -> tuple[Rule, ...]:
    """The rules of a linear map's weight and bias."""
    return Rule(target, (f"{source}.weight",), weight), Rule(
        f"{target}_bias", (f"{source}.bias",), bias
    )


def megatron_layer(attention_norm: str, ffn_norm: str) -> tuple[Rule, ...]:
    """The rules of a layer under the names that Megatron gave to Bloom and Falcon: a fused tensor
    of each KV head's queries, key and value.

    Args:
        attention_norm, ffn_norm: the norms' names.
    """
    here, there = "layers/{i}/", "h.{i}."
    return (
        *norm(f"{here}attention_norm", f"{there}{attention_norm}"),
        *linear(
            f"{here}attention/qkv",
            f"{there}self_attention.query_key_value",
            split_groups,
            split_groups,
        ),
        *linear(f"{here}attention/out", f"{there}self_attention.dense", split_inputs),
        *norm(f"{here}ffn_norm", f"{there}{ffn_norm}"),
        *linear(f"{here}ffn/up", f"{there}mlp.dense_h_to_4h", stack_parts, stack_parts),
        *linear(f"{here}ffn/down", f"{there}mlp.dense_4h_to_h"),
    )
