"""Arguments of the op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from pallas_kernels.add_rms_norm import RMSNorm


class GatedMLP(NamedTuple):
    """down(silu(gate) * up).

    Attributes:
        up: [2, ffn, hidden], gate and up.
        down: [hidden, ffn].
    """

    up: jax.Array
    down: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experts:
    """A mixture of gated MLPs, chosen by the largest of the router's products, and weighed by their
    softmax.

    Attributes:
        router: [experts, hidden].
        up: [experts, 2, ffn, hidden].
        down: [experts, hidden, ffn].
        top_k: how many are chosen.
        normalize: whether the chosen ones' weights are divided by their sum.
        scale: of the weights.
    """

    router: jax.Array
    up: jax.Array
    down: jax.Array
    top_k: int = field(metadata={"static": True})
    normalize: bool = field(metadata={"static": True})
    scale: float = field(default=1.0, metadata={"static": True})


class LayerWeights(NamedTuple):
    """Of a layer behind its queries, keys and values, and of what follows it.

    Attributes:
        out: [hidden, inputs], of attention's output.
        norm: before the feed-forward network.
        ffn: that network.
        next_norm: behind the layer.
        next: [outputs, hidden], of the product behind it: the next layer's queries, keys and
            values, or the head.
    """

    out: jax.Array
    norm: RMSNorm
    ffn: GatedMLP | Experts
    next_norm: RMSNorm
    next: jax.Array
