"""What Gemma 2 and 3 share."""

from __future__ import annotations

from collections.abc import Mapping

from converters.families import _llama_like
from converters.families._llama_like import ACTIVATIONS, MAX_VOCAB, MAX_WIDTH, SLIDING
from converters.fields import Fields
from converters.rules import Rule, one_plus
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)

NORMS = {
    "layers/{i}/attention_norm/scale": "layers.{i}.input_layernorm.weight",
    "layers/{i}/attention_out_norm/scale": "layers.{i}.post_attention_layernorm.weight",
    "layers/{i}/ffn_norm/scale": "layers.{i}.pre_feedforward_layernorm.weight",
    "layers/{i}/ffn_out_norm/scale": "layers.{i}.post_feedforward_layernorm.weight",
    "layers/{i}/attention/q_norm/scale": "layers.{i}.self_attn.q_norm.weight",
    "layers/{i}/attention/k_norm/scale": "layers.{i}.self_attn.k_norm.weight",
    "head/norm/scale": "norm.weight",
}
LAYOUT = _llama_like.LAYOUT.with_rules(
    *(Rule(target, (source,), one_plus) for target, source in NORMS.items())
)


def layer_types(fields: Fields, period: int) -> list[str]:
    """What "layer_types" says, or else full attention in the last layer of each ``period``."""
    count = _llama_like.num_layers(fields)
    usual = [SLIDING if index % period else "full_attention" for index in range(1, count + 1)]
    return _llama_like.layer_types(fields) or usual


def softcap(fields: Fields, key: str, default: float | None) -> float | None:
    """A softcap; null is none."""
    return fields.number(key, None if key in fields.values else default)


def config(
    fields: Fields,
    architecture: str,
    *,
    types: list[str],
    ropes: Mapping[str, RopeSpec],
    max_model_len: int,
    attention_softcap: float | None = None,
    logit_softcap: float | None = None,
    qk_norm: bool = False,
) -> ModelConfig:
    """The ModelConfig of a Gemma.

    Args:
        types: of each layer, see ``layer_types``.
        ropes: by layer type.
        max_model_len, logit_softcap: see ModelConfig.
        attention_softcap, qk_norm: see AttentionSpec.
    """
    if fields.boolean("use_bidirectional_attention", False):
        raise UnsupportedModelError(
            f"{fields.where}: use_bidirectional_attention=true is not supported: this model reads "
            "texts, it writes none."
        )
    query, kv, size = _llama_like.heads(fields, 256)
    hidden = fields.integer("hidden_size", maximum=MAX_WIDTH)
    window = fields.integer("sliding_window", None if "sliding_window" in fields.values else 4096)
    if window is None and SLIDING in types:
        raise fields.wrong("sliding_window", f"the window of the layers with {SLIDING}")
    bias = fields.boolean("attention_bias", False)
    norm = NormSpec("rms", fields.number("rms_norm_eps", 1e-6, maximum=1.0), wide_scale=True)
    mlp = MLPSpec(
        fields.integer("intermediate_size", maximum=MAX_WIDTH),
        fields.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),  # type: ignore[arg-type]
    )

    def layer(layer_type: str) -> LayerSpec:
        attention = AttentionSpec(
            num_heads=query,
            num_kv_heads=kv,
            head_size=size,
            scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
            rope=ropes[layer_type],
            sliding_window=window if layer_type == SLIDING else None,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm if qk_norm else None,
            softcap=attention_softcap,
        )
        return LayerSpec(attention, mlp, norm, "sandwich")

    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=max_model_len,
        layers=tuple(layer(each) for each in types),
        final_norm=norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        embedding_size=hidden,
        embedding_scale=hidden**0.5,
        logit_softcap=logit_softcap,
        dtype=_llama_like.dtype(fields),
    )
