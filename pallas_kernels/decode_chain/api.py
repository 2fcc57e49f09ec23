"""The op's signature and the order of its implementations."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.decode_chain import mosaic_gpu, reference
from pallas_kernels.decode_chain.types import ChainWeights
from pallas_kernels.dispatch import Implementation

IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu.decode_chain, "reference": reference.decode_chain}


def decode_chain(
    x: jax.Array,
    attended: jax.Array,
    weights: ChainWeights,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """From the heads' outputs of one token to the product behind its layer: attention's output,
    residual, norm, down(silu(gate) * up), residual, norm, product.

    Args:
        x: [1, hidden], the residual stream before the layer.
        attended: [1, inputs], what attention's heads give.
        weights: of x's dtype.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        The residual stream behind the layer, [1, hidden], and the next product, float32
        [1, outputs].

    Raises:
        ValueError: shapes don't fit together.
        ExceptionGroup: no implementation can run the case.
    """
    hidden, inputs, ffn = x.shape[1], attended.shape[1], weights.down.shape[1]
    shapes = (x.shape[0], weights.out.shape, weights.up.shape, weights.down.shape)
    if shapes != (1, (hidden, inputs), (2, ffn, hidden), (hidden, ffn)):
        raise ValueError(f"x {x.shape}, attended {attended.shape} and {shapes[1:]} don't fit")
    if weights.next.shape[1:] != (hidden,):
        raise ValueError(f"x {x.shape} and the next weight {weights.next.shape} don't fit")
    return dispatch.call("decode_chain", IMPLEMENTATIONS, implementation, x, attended, weights)
