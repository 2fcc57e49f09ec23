"""The op's signature and the order of its implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.truncation_threshold import reference, triton

IMPLEMENTATIONS = {
    "triton": triton.truncation_threshold,
    "reference": reference.truncation_threshold,
}


def truncation_threshold(
    logits: jax.Array,
    min_p: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Where min-p, top-k and top-p, applied in this order, cut each lane's distribution.

    All three keep the tokens from some logit on, so one number per lane says what they leave. The
    caller's comparison with it fuses into whatever reads the logits next.

    Args:
        logits: float32 [L, vocab], after temperature; -inf rules a token out. A lane with NaN or
            +inf gets an unspecified threshold.
        min_p: float32 [L], from 0 to 1; keeps tokens at least this many times as likely as the
            likeliest. 0 keeps all.
        top_k: int32 [L]; keeps the k likeliest of those, and what ties with the last of them. 0,
            negative, or the size of the vocabulary and more keep all.
        top_p: float32 [L]; keeps the fewest likeliest of those whose probabilities, renormalized,
            reach it, and what ties with the last of them; at least the likeliest. 1 keeps all.
        implementation: a name in ``IMPLEMENTATIONS`` or a function of this signature; see
            ``dispatch.call``. None takes the first that can run.

    Returns:
        float32 [L]: the tokens with ``logits >= threshold`` are kept. -inf for a lane that asks for
        no truncation; such lanes cost next to nothing.

    Raises:
        ValueError: shapes or dtypes are not as above.
        ExceptionGroup: no implementation can run the case.
    """
    if logits.ndim != 2 or logits.dtype != jnp.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits must be float32 [L, vocab], got {logits.dtype} {logits.shape}")
    for name, setting, dtype in (
        ("min_p", min_p, jnp.float32),
        ("top_k", top_k, jnp.int32),
        ("top_p", top_p, jnp.float32),
    ):
        if setting.shape != logits.shape[:1] or setting.dtype != dtype:
            wanted = f"{jnp.dtype(dtype).name} {logits.shape[:1]}"
            raise ValueError(f"{name} must be {wanted}, got {setting.dtype} {setting.shape}")
    arguments = (logits, min_p, top_k, top_p)
    return dispatch.call("truncation_threshold", IMPLEMENTATIONS, implementation, *arguments)
