"""GPT-2: learned positions, LayerNorm, biases; its matrices are stored as [inputs, outputs]."""

from __future__ import annotations

from typing import Any

from converters.families import _gpt_like, _llama_like
from converters.families._gpt_like import linear, norm
from converters.families._llama_like import ACTIVATIONS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH
from converters.lazy import Lazy
from converters.rules import (
    Layout,
    Rule,
    Source,
    Transform,
    same,
    split_inputs,
    split_qkv,
    stack_parts,
)
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import AttentionSpec, LayerSpec, LearnedPositions, MLPSpec, ModelConfig
from jaxserve.model.params import Param

ARCHITECTURES = ("GPT2LMHeadModel",)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_gpt2.py and modeling_gpt2.py."""
    fields = _llama_like.open_config(hf)
    if fields.boolean("add_cross_attention", False):
        raise UnsupportedModelError(f"{fields.where}: add_cross_attention is not supported.")
    hidden, heads, size = _gpt_like.sizes(
        fields, fields.named("n_embd", "hidden_size"), fields.named("n_head", "num_attention_heads")
    )
    scale = size**-0.5 if fields.boolean("scale_attn_weights", True) else 1.0
    by_layer = fields.boolean("scale_attn_by_inverse_layer_idx", False)
    layer_norm = _gpt_like.layer_norm(fields)
    mlp = MLPSpec(
        fields.integer("n_inner", 4 * hidden, maximum=MAX_WIDTH),
        fields.choice("activation_function", ACTIVATIONS, "gelu_new"),  # type: ignore[arg-type]
        gated=False,
        up_bias=True,
        down_bias=True,
    )

    def layer(index: int) -> LayerSpec:
        attention = AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_size=size,
            scale=scale / (index + 1) if by_layer else scale,
            qkv_bias=True,
            out_bias=True,
        )
        return LayerSpec(attention, mlp, layer_norm)

    positions = _gpt_like.length(
        fields, fields.named("n_positions", "max_position_embeddings"), 1024
    )
    count = fields.integer(fields.named("n_layer", "num_hidden_layers"), maximum=MAX_LAYERS)
    return ModelConfig(
        architecture=ARCHITECTURES[0],
        vocab_size=fields.integer("vocab_size", maximum=MAX_VOCAB),
        hidden_size=hidden,
        max_model_len=positions,
        layers=tuple(layer(index) for index in range(count)),
        final_norm=layer_norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        embedding_size=hidden,
        learned_positions=LearnedPositions(positions),
        dtype=_llama_like.dtype(fields),
    )


def _transposed(transform: Transform) -> Transform:
    """The transform for a matrix that is stored as [inputs, outputs]."""

    def apply(sources: tuple[Source, ...], param: Param) -> Lazy:
        turned = (Source(source.name, source.array.transpose(1, 0)) for source in sources)
        return transform(tuple(turned), param)

    return apply


LAYOUT = Layout(
    rules=(
        Rule("embed/tokens", ("wte.weight",)),
        Rule("embed/positions", ("wpe.weight",)),
        *norm("layers/{i}/attention_norm", "h.{i}.ln_1"),
        *linear("layers/{i}/attention/qkv", "h.{i}.attn.c_attn", _transposed(split_qkv), split_qkv),
        *linear("layers/{i}/attention/out", "h.{i}.attn.c_proj", _transposed(split_inputs)),
        *norm("layers/{i}/ffn_norm", "h.{i}.ln_2"),
        *linear("layers/{i}/ffn/up", "h.{i}.mlp.c_fc", _transposed(stack_parts), stack_parts),
        *linear("layers/{i}/ffn/down", "h.{i}.mlp.c_proj", _transposed(same)),
        *norm("head/norm", "ln_f"),
        Rule("head/tokens", ("lm_head.weight",)),
    ),
    prefixes=("transformer.",),
    dropped=("h.*.attn.bias", "h.*.attn.masked_bias"),  # the causal mask
    dropped_if_tied=("lm_head.weight",),
)
