"""TeleChat3: Llama, with a YaRN of its own."""

from __future__ import annotations

from typing import Any

from converters.families import _llama_like
from jaxserve.errors import UnsupportedModelError
from jaxserve.model.config import ModelConfig

ARCHITECTURES = ("TeleChat3ForCausalLM", "Telechat3ForCausalLM")
LAYOUT = _llama_like.LAYOUT


def config(hf: dict[str, Any]) -> ModelConfig:
    """See configuration_telechat3.py and modeling_telechat3.py of TeleAI/TeleChat3-36B-Thinking.
    "share_attention", "share_ffn" and "embedding_size" mean something only in models that run
    layers several times, in groups."""
    fields = _llama_like.open_config(hf)
    layers = _llama_like.num_layers(fields)
    if fields.integer("num_hidden_layer_groups", layers) != layers:
        raise UnsupportedModelError(
            f"{fields.where}: num_hidden_layer_groups other than num_hidden_layers={layers} is not "
            "supported: layers would share weights."
        )
    bias = fields.boolean("attention_bias", False)
    return _llama_like.config(
        fields,
        ARCHITECTURES[0],
        default_length=2048,
        windows=[None] * layers,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        default_theta=1000000.0,
        default_eps=1e-5,
    )
