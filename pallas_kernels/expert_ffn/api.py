"""The op's signature and the order of its implementations."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.expert_ffn import reference, triton

# No mosaic_tpu: XLA for TPUs has a grouped product for ``ragged_dot``.
IMPLEMENTATIONS = {"triton": triton.expert_ffn, "reference": reference.expert_ffn}


def expert_ffn(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
    activation: str = "silu",
    implementation: Implementation | None = None,
) -> jax.Array:
    """sum over k of weights[:, k] * network(experts[:, k])(x), with network(e)(x) =
    down[e] gated(up[e, 0] x, up[e, 1] x), biases added where given.

    Args:
        x: [T, hidden].
        experts: int32 [T, top_k]; numbers outside of [0, E) add nothing: those experts lie on
            other devices.
        weights: float32 [T, top_k].
        up: [E, 2, ffn, hidden], gate and up.
        down: [E, hidden, ffn].
        up_bias, down_bias: [E, 2, ffn] and [E, hidden].
        activation: a key of ``activations.GATED``.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        Terms [S, T, hidden] in x's dtype whose sum is the result.

    Raises:
        ValueError: shapes don't fit together.
        ExceptionGroup: no implementation can run the case.
    """
    count, parts, size, hidden = up.shape
    if parts != 2 or down.shape != (count, hidden, size) or x.shape[1] != hidden:
        raise ValueError(f"x {x.shape}, up {up.shape} and down {down.shape} don't fit together")
    if experts.shape != weights.shape or experts.shape[0] != x.shape[0]:
        raise ValueError(
            f"experts {experts.shape} and weights {weights.shape} don't fit x {x.shape}"
        )
    return dispatch.call(
        "expert_ffn",
        IMPLEMENTATIONS,
        implementation,
        x,
        experts,
        weights,
        up,
        down,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
    )
