"""The op's signature and the order of its implementations."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.fused_linear import reference, triton
from pallas_kernels.fused_linear.types import RMSNorm

IMPLEMENTATIONS = {
    "triton": triton.fused_linear,
    "reference": reference.fused_linear,
}


def fused_linear(
    x: jax.Array,
    w: jax.Array,
    *,
    norm: RMSNorm | None = None,
    silu_gated: bool = False,
    residual: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x w^T, with x normalized before if asked, and gated or added to ``residual`` after.

    Args:
        x: [T, K].
        w: [N, K]; if ``silu_gated`` [2, N, K]: the result is silu(x w[0]^T) * (x w[1]^T).
        norm: RMSNorm of x's rows, applied first.
        residual: [T, N], added last; not together with ``silu_gated``.
        implementation: a name in ``IMPLEMENTATIONS``; None takes the first that can run.

    Returns:
        [T, N] in x's dtype, summed in float32.

    Raises:
        ValueError: shapes don't fit together, or gating and residual are both asked for.
        ExceptionGroup: no implementation can run the case.
    """
    if w.ndim != (3 if silu_gated else 2) or w.shape[-1] != x.shape[1]:
        raise ValueError(f"x {x.shape} and the weight {w.shape} don't fit together")
    if silu_gated and residual is not None:
        raise ValueError("a gated result can't take a residual")
    options = {"norm": norm, "silu_gated": silu_gated, "residual": residual}
    return dispatch.call("fused_linear", IMPLEMENTATIONS, implementation, x, w, **options)
