"""The residual stream, with what the last half of a layer adds to it still pending.

The sum is taken where the stream is read next, together with the norm that stands there: one pass
over the stream instead of two, and the terms of a split matrix product are added up for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.model import norms
from jaxserve.model.config import NormSpec
from jaxserve.model.params import Params
from pallas_kernels.add_rms_norm import RMSNorm, add_rms_norm
from pallas_kernels.dispatch import CHOOSE, Kernels


class Residual(NamedTuple):
    """The stream of T tokens.

    Attributes:
        x: [T, hidden].
        pending: [S, T, hidden], terms to be added to x; None for none.
    """

    x: jax.Array
    pending: jax.Array | None = None

    def settled(self) -> jax.Array:
        """The stream with what was pending added, [T, hidden]."""
        if self.pending is None:
            return self.x
        total = self.x.astype(jnp.float32) + self.pending.sum(0, dtype=jnp.float32)
        return total.astype(self.x.dtype)

    def take(self, index: jax.Array | None) -> Residual:
        """The stream of the tokens ``index`` [L]; of all if None."""
        if index is None:
            return self
        return Residual(self.x[index], None if self.pending is None else self.pending[:, index])

    def normalized(
        self,
        spec: NormSpec,
        params: Params,
        kernels: Kernels = CHOOSE,
    ) -> tuple[Residual, jax.Array]:
        """The settled stream, and its tokens normalized [T, hidden]."""
        if self.pending is None or spec.kind != "rms":
            x = self.settled()
            return Residual(x), norms.apply(spec, params, x)
        norm = RMSNorm(params["scale"], spec.eps)
        x, h = add_rms_norm(self.x, self.pending, norm, implementation=kernels.add_rms_norm)
        return Residual(x), h
