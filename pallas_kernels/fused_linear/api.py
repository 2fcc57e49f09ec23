"""The op's signature and the order of its implementations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.fused_linear import mosaic_gpu, reference, triton

# No mosaic_tpu: XLA for TPUs makes one product of it, with the norm's scaling fused in. Only the
# gate is a fusion of its own, which for Llama 8B adds 0.4 % to the bytes moved with 8 rows, and 3 %
# with 64 (XLA's own count).
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic_gpu": mosaic_gpu.fused_linear,
    "triton": triton.fused_linear,
    "reference": reference.fused_linear,
}


def fused_linear(
    x: jax.Array,
    w: jax.Array,
    *,
    silu_gated: bool = False,
    partial: bool = False,
    out_dtype: jnp.dtype | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x w^T, gated if asked.

    Args:
        x: [T, K].
        w: [N, K]; if ``silu_gated`` [2, N, K]: the result is silu(x w[0]^T) * (x w[1]^T).
        partial: leaves the sum over K unfinished: the result is [S, T, N], in float32 or x's dtype,
            and its sum over S terms (as many as suit the implementation) is the product. For
            narrow weights: their columns must be shared among programs to keep a GPU busy, and
            whoever reads the product sums it up for nothing.
        out_dtype: of the result, x's by default; partial sums may be float32 all the same.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        [T, N], summed in float32; [S, T, N] if ``partial``.

    Raises:
        ValueError: shapes don't fit together, or gating and ``partial`` are both asked for.
        ExceptionGroup: no implementation can run the case.
    """
    if w.ndim != (3 if silu_gated else 2) or w.shape[-1] != x.shape[1]:
        raise ValueError(f"x {x.shape} and the weight {w.shape} don't fit together")
    if silu_gated and partial:
        raise ValueError("partial sums can't be gated")
    options = {"silu_gated": silu_gated, "partial": partial, "out_dtype": out_dtype}
    return dispatch.call("fused_linear", IMPLEMENTATIONS, implementation, x, w, **options)
