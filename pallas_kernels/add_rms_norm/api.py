"""The op's signature and the order of its implementations."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.add_rms_norm import reference, triton
from pallas_kernels.add_rms_norm.types import RMSNorm
from pallas_kernels.dispatch import Implementation

IMPLEMENTATIONS = {
    "triton": triton.add_rms_norm,
    "reference": reference.add_rms_norm,
}


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array,
    norm: RMSNorm,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream x plus what a half of a layer adds to it, and that sum normalized.

    Args:
        x: [T, K].
        delta: [S, T, K], S terms to be added to x: the partial sums of ``fused_linear``.
        norm: RMSNorm of the sum's rows.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        The sum, added up in float32 and rounded to x's dtype, and its rows normalized, both [T, K].

    Raises:
        ValueError: shapes don't fit together.
        ExceptionGroup: no implementation can run the case.
    """
    if delta.shape[1:] != x.shape or norm.scale.shape != x.shape[1:]:
        raise ValueError(
            f"x {x.shape}, delta {delta.shape} and the scale {norm.scale.shape} don't fit together"
        )
    return dispatch.call("add_rms_norm", IMPLEMENTATIONS, implementation, x, delta, norm)
