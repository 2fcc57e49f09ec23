"""Arguments of the op."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RMSNorm:
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): scale [K], and what is added to the
    mean of the squares."""

    scale: jax.Array
    eps: float = field(metadata={"static": True})
