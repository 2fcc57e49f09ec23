"""DeepSeek-V3, its successors and R1: latent attention, and experts chosen by sigmoids of their
logits, to which a learned correction is added for the choice."""

from __future__ import annotations

from typing import Any

from converters.families import _deepseek, _llama_like
from converters.rules import Layout
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("DeepseekV3ForCausalLM",)


def layout(config: ModelConfig) -> Layout:
    """The rules; the layer behind the last predicts a second token (num_nextn_predict_layers),
    which takes no part in the first's logits."""
    return _deepseek.layout(config, (f"layers.{len(config.layers)}.*",))


def config(hf: dict[str, Any]) -> ModelConfig:
    """See transformers' configuration_deepseek_v3.py; "scoring_func", "topk_method" and
    "moe_layer_freq" are of the modeling_deepseek.py published with the weights."""
    fields = _llama_like.open_config(hf)
    if not fields.boolean("rope_interleave", True):
        raise UnsupportedModelError(
            f"{fields.where}: rope_interleave=false is not supported for {ARCHITECTURES[0]}."
        )
    fields.choice("topk_method", {"noaux_tc": None}, "noaux_tc")
    fields.choice("scoring_func", {"sigmoid": None}, "sigmoid")
    router = _deepseek.router(
        fields,
        grouped=True,
        default_scale=2.5,
        scores="sigmoid",
        normalize=fields.boolean("norm_topk_prob", True),
        correction=True,
        group_score="top2",
    )
    return _deepseek.config(
        fields, ARCHITECTURES[0], router, default_length=4096, default_dense_layers=3
    )
