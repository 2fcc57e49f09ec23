"""gpt-oss: a sink in each head, windows in every other layer, and experts in MXFP4."""

from __future__ import annotations

import dataclasses
from typing import Any

from converters.families import _llama_like, _moe
from converters.families._llama_like import SLIDING, num_layers
from converters.lazy import Lazy
from converters.mxfp4 import BLOCK, CODES, Mxfp4
from converters.rules import Rule, Source
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import AttentionSpec, LayerSpec, ModelConfig
from jaxserve.model.params import Param

ARCHITECTURES = ("GptOssForCausalLM",)


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_gpt_oss.py and modeling_gpt_oss.py.

    The published files are a mixture: their "quantization_config" covers the experts alone.
    """
    fields = _llama_like.open_config(hf, quant_method="mxfp4")
    for key, ours in {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}.items():
        if fields.number(key, ours) != ours:
            raise UnsupportedModelError(
                f"{fields.where}: {key} other than {ours} is not supported."
            )
    if "rope_scaling" not in fields and "rope_parameters" not in fields:
        raise fields.wrong("rope_scaling", "the settings of its yarn")
    window = fields.integer("sliding_window", 128)
    types = _llama_like.layer_types(fields)
    if types is None:
        types = [("full_attention" if i % 2 else SLIDING) for i in range(num_layers(fields))]
    bias = fields.boolean("attention_bias", True)
    plain = _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=131072,
        windows=[window if each == SLIDING else None for each in types],
        qkv_bias=bias,
        out_bias=bias,
        default_head_size=64,
        default_theta=150000.0,
        default_eps=1e-5,
    )
    moe = _moe.spec(fields, count="num_local_experts", width="intermediate_size", normalize=True)
    router = dataclasses.replace(moe.router, bias=True)
    moe = dataclasses.replace(moe, router=router, activation="clamped_silu", bias=True)
    norm = dataclasses.replace(plain.layers[0].norm, wide_scale=True)

    def own(layer: LayerSpec) -> LayerSpec:
        assert isinstance(layer.attention, AttentionSpec)
        return LayerSpec(dataclasses.replace(layer.attention, sinks=True), moe, norm)

    return dataclasses.replace(
        plain, layers=tuple(own(layer) for layer in plain.layers), final_norm=norm
    )


def _dequantized(sources: tuple[Source, ...], *shape: int) -> Lazy:
    """The blocks and the scales of one weight."""
    *rows, columns = shape
    groups = (*rows, -(-columns // BLOCK))
    blocks, scales = sources
    return Mxfp4(
        blocks.expect(*groups, BLOCK // 2, dtypes=(CODES,)), scales.expect(*groups, dtypes=(CODES,))
    )[tuple(slice(0, size) for size in shape)]


def _packed_up(sources: tuple[Source, ...], param: Param) -> Lazy:
    """MXFP4, [E, 2 * F, hidden] with gate and up in turns -> [E, 2, F, hidden]."""
    experts, _, size, hidden = param.shape
    rows = _dequantized(sources, experts, 2 * size, hidden)
    return rows.reshape(experts, size, 2, hidden).transpose(0, 2, 1, 3)


def _packed_down(sources: tuple[Source, ...], param: Param) -> Lazy:
    """MXFP4, [E, hidden, F]."""
    return _dequantized(sources, *param.shape)


def _plain_up(sources: tuple[Source, ...], param: Param) -> Lazy:
    """[E, hidden, 2 * F] with gate and up in turns -> [E, 2, F, hidden]."""
    experts, _, size, hidden = param.shape
    columns = sources[0].expect(experts, hidden, 2 * size)
    return columns.reshape(experts, hidden, size, 2).transpose(0, 3, 2, 1)


def _plain_down(sources: tuple[Source, ...], param: Param) -> Lazy:
    """[E, F, hidden] -> [E, hidden, F]."""
    experts, hidden, size = param.shape
    return sources[0].expect(experts, size, hidden).transpose(0, 2, 1)


def _up_bias(sources: tuple[Source, ...], param: Param) -> Lazy:
    """[E, 2 * F] with gate and up in turns -> [E, 2, F]."""
    experts, _, size = param.shape
    turns = sources[0].expect(experts, 2 * size)
    return turns.reshape(experts, size, 2).transpose(0, 2, 1)


def _rules() -> tuple[Rule, ...]:
    here, mlp = "layers/{i}/ffn/", "layers.{i}.mlp."
    up, down = f"{mlp}experts.gate_up_proj", f"{mlp}experts.down_proj"
    return (
        Rule("layers/{i}/attention/sinks", ("layers.{i}.self_attn.sinks",)),
        Rule(f"{here}router", (f"{mlp}router.weight",)),
        Rule(f"{here}router_bias", (f"{mlp}router.bias",)),
        Rule(f"{here}experts_up", (f"{up}_blocks", f"{up}_scales"), _packed_up),
        Rule(f"{here}experts_up", (up,), _plain_up),
        Rule(f"{here}experts_up_bias", (f"{up}_bias",), _up_bias),
        Rule(f"{here}experts_down", (f"{down}_blocks", f"{down}_scales"), _packed_down),
        Rule(f"{here}experts_down", (down,), _plain_down),
        Rule(f"{here}experts_down_bias", (f"{down}_bias",)),
    )


LAYOUT = dataclasses.replace(_llama_like.LAYOUT, rules=_llama_like.LAYOUT.rules + _rules())
