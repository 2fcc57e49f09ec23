"""What families with a mixture of experts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from converters.families._llama_like import ACTIVATIONS, MAX_WIDTH
from converters.fields import Fields
from converters.rules import Layout, Rule, stack_experts
from jaxserve.model.config import ModelConfig, MoESpec, RouterSpec

MAX_EXPERTS = 2**16


def spec(fields: Fields, *, count: str, width: str, normalize: bool) -> MoESpec:
    """Gated experts of which a softmax chooses "num_experts_per_tok".

    Args:
        count, width: the keys of the number of experts and of their intermediate size.
        normalize: see RouterSpec.
    """
    experts = fields.integer(count, maximum=MAX_EXPERTS)
    return MoESpec(
        num_experts=experts,
        intermediate_size=fields.integer(width, maximum=MAX_WIDTH),
        router=RouterSpec(
            top_k=fields.integer("num_experts_per_tok", maximum=experts), normalize=normalize
        ),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),  # type: ignore[arg-type]
    )


def qwen_dense_layers(fields: Fields, layers: int) -> set[int]:
    """The layers without experts: those of "mlp_only_layers", and all but every
    "decoder_sparse_step"-th."""
    step = fields.integer("decoder_sparse_step", 1)
    return {index for index in range(layers) if (index + 1) % step} | set(
        fields.integers("mlp_only_layers")
    )


def with_experts(config: ModelConfig, moe: MoESpec, dense: Collection[int] = ()) -> ModelConfig:
    """The config with experts in the place of every feed-forward network but the ``dense`` ones."""
    layers = (
        layer if index in dense else dataclasses.replace(layer, ffn=moe)
        for index, layer in enumerate(config.layers)
    )
    return dataclasses.replace(config, layers=tuple(layers))


def with_expert_rules(layout: Layout, router: str, gate: str, up: str, down: str) -> Layout:
    """The layout, with rules for the router and for experts whose weights are a tensor each.

    Args:
        layout: of the rest.
        router, gate, up, down: names of tensors within a layer; ``{e}`` stands for the expert.
    """
    here, there = "layers/{i}/ffn/", "layers.{i}."
    rules = (
        Rule(f"{here}router", (there + router,)),
        Rule(f"{here}experts_up", (there + gate, there + up), stack_experts),
        Rule(f"{here}experts_down", (there + down,), stack_experts),
    )
    return dataclasses.replace(layout, rules=layout.rules + rules)


def with_qwen_rules(layout: Layout) -> Layout:
    """The layout, with the experts' names of Qwen."""
    expert = "mlp.experts.{e}."
    return with_expert_rules(
        layout,
        "mlp.gate.weight",
        f"{expert}gate_proj.weight",
        f"{expert}up_proj.weight",
        f"{expert}down_proj.weight",
    )
