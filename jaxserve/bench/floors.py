"""The least time that a work can take: its bytes at full bandwidth, or its FLOPs at full speed.

All prompts are computed first, then all outputs token by token; each of the two phases takes at
least the time of its bytes and at least that of its FLOPs. (An engine that hides the one phase's
FLOPs behind the other's bytes completely could be faster than this sum; none here does.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jaxserve.model import decoder, kv_cache
from jaxserve.model.config import ModelConfig, MoESpec

NOT_MULTIPLIED = ("embed/tokens", "embed/positions")
"""Tables of which a token reads one row."""


@dataclass(frozen=True)
class Hardware:
    """What all devices of an engine can do together.

    Attributes:
        bandwidth: of the device memory, in bytes per second.
        flops: dense products in the model's dtype, in floating-point operations per second.
    """

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Experts:
    """What the mixtures of experts of one kind cost.

    Attributes:
        count: experts of a layer.
        top_k: how many of them a token goes through.
        bytes: of one expert in each of these layers.
    """

    count: int
    top_k: int
    bytes: int


@dataclass(frozen=True)
class Costs:
    """What a model's tokens cost.

    Attributes:
        vocab_size: ids that its embedding knows.
        weight_bytes: read by each step, whatever its tokens.
        token_flops: of each computed token, without attention.
        sampled_flops: of each sampled token besides: its logits, and what stands behind the last
            attention, which no other token needs.
        kv_bytes: read for each generated token and token of its context.
        attention_flops: of each token and token of its context.
        experts: of which a step reads those that its tokens chose.
    """

    vocab_size: int
    weight_bytes: int
    token_flops: int
    sampled_flops: int
    kv_bytes: int
    attention_flops: int
    experts: tuple[Experts, ...] = ()

    def step_bytes(self, tokens: int) -> float:
        """Bytes of the weights that a step reads, where tokens choose experts at random: of E
        experts, (1 - top_k / E) ** tokens * E are expected to be chosen by none."""
        return self.weight_bytes + sum(
            each.bytes * each.count * (1 - (1 - each.top_k / each.count) ** tokens)
            for each in self.experts
        )


def costs(model: ModelConfig, dtype: str) -> Costs:
    """The costs of a model whose weights and cache are of a dtype ("bfloat16", ...)."""
    tree = decoder.declare(model)
    size = jnp.dtype(dtype).itemsize
    head = "embed/tokens" if model.tie_word_embeddings else "head/tokens"
    last = f"layers/{len(model.layers) - 1}"
    behind_last_attention = f"{last}/attention/out", f"{last}/ffn/"
    read = 0
    products = {"computed": 0, "sampled": tree[head].size}  # multiplications, by who needs them
    of_expert: Counter[tuple[int, int]] = Counter()  # by (count, top_k), in all their layers
    for path, param in tree.items():
        if path in NOT_MULTIPLIED and path != head:
            continue
        multiplied = len(param.shape) > 1 and not path.endswith("bias") and path != head
        who = "sampled" if path.startswith(behind_last_attention) else "computed"
        if param.axes[0] == "experts":
            spec = model.layers[int(path.split("/")[1])].ffn
            assert isinstance(spec, MoESpec)
            each = param.size // spec.num_experts
            of_expert[spec.num_experts, spec.router.top_k] += each
            products[who] += multiplied * spec.router.top_k * each
        else:
            read += param.size
            products[who] += multiplied * param.size
    heads = sum(layer.attention.num_heads * layer.attention.head_size for layer in model.layers)
    return Costs(
        vocab_size=model.vocab_size,
        weight_bytes=read * size,
        token_flops=2 * products["computed"],
        sampled_flops=2 * products["sampled"],
        kv_bytes=kv_cache.bytes_per_page(model, 1, jnp.dtype(dtype)),
        attention_flops=4 * heads,  # a product with the keys, one with the values
        experts=tuple(Experts(*kind, each * size) for kind, each in of_expert.items()),
    )


def floor_seconds(
    cost: Costs, lengths: Sequence[tuple[int, int]], rows: int, hardware: Hardware
) -> float:
    """Least seconds of requests of (input, output) lengths, of which ``rows`` run at once."""
    prompts = sum(i for i, _ in lengths)
    flops = prompts * cost.token_flops + len(lengths) * cost.sampled_flops
    flops += cost.attention_flops * sum(i * (i + 1) // 2 for i, _ in lengths)
    reading = max(flops / hardware.flops, cost.step_bytes(prompts) / hardware.bandwidth)

    # The step that ends a prompt samples its first token.
    decoded = [(i, o - 1) for i, o in lengths if o > 1]
    tokens = sum(o for _, o in decoded)
    rows = max(1, min(rows, len(decoded)))
    steps = max(math.ceil(tokens / rows), max((o for _, o in decoded), default=0))
    # More rows add ever less to the bytes of a step: least are read where steps are full or of one.
    single = cost.step_bytes(1)
    per_row = (cost.step_bytes(rows) - single) / max(1, rows - 1)
    context = sum(o * i + o * (o + 1) // 2 for i, o in decoded)
    bytes_read = steps * single + (tokens - steps) * per_row + context * cost.kv_bytes
    flops = tokens * (cost.token_flops + cost.sampled_flops) + context * cost.attention_flops
    return reading + max(flops / hardware.flops, bytes_read / hardware.bandwidth)
