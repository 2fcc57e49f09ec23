"""Arguments of the op."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax

CosSin = tuple[jax.Array, jax.Array]
Result = tuple[jax.Array, jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over each query and key head: scales [head_size], and what is added to the mean."""

    q_scale: jax.Array
    k_scale: jax.Array
    eps: float = field(metadata={"static": True})
