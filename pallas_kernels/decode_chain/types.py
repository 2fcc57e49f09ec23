"""Arguments of the op."""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.add_rms_norm import RMSNorm


class ChainWeights(NamedTuple):
    """Of a layer's second part and of what follows it.

    Attributes:
        out: [hidden, inputs], of attention's output.
        norm: before the feed-forward network.
        up: [2, ffn, hidden], gate and up.
        down: [hidden, ffn].
        next_norm: behind the layer.
        next: [outputs, hidden], of the product behind it: the next layer's queries, keys and
            values, or the head.
    """

    out: jax.Array
    norm: RMSNorm
    up: jax.Array
    down: jax.Array
    next_norm: RMSNorm
    next: jax.Array
