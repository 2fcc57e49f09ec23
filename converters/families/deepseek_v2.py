"""DeepSeek-V2 and V2-Lite: latent attention, and experts chosen by a softmax."""

from __future__ import annotations

from typing import Any

from converters.families import _deepseek, _llama_like
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("DeepseekV2ForCausalLM",)
layout = _deepseek.layout


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_deepseek_v2.py; "scoring_func" and "moe_layer_freq" are of
    the modeling_deepseek.py published with the weights.

    Raises:
        UnsupportedModelError: norm_topk_prob, which the published code and transformers read
            differently, or mlp_bias.
    """
    fields = _llama_like.open_config(hf)
    for key in ("norm_topk_prob", "mlp_bias"):
        if fields.boolean(key, False):
            raise UnsupportedModelError(
                f"{fields.where}: {key}=true is not supported for {ARCHITECTURES[0]}."
            )
    grouped = fields.choice(
        "topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy"
    )
    fields.choice("scoring_func", {"softmax": None}, "softmax")
    router = _deepseek.router(fields, grouped=grouped, default_scale=1.0, scores="softmax")
    return _deepseek.config(
        fields, ARCHITECTURES[0], router, default_length=2048, default_dense_layers=0
    )
