"""Which truncations a lane asks for."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Asked(NamedTuple):
    """bool, scalars or [L]: whether each truncation can drop a token."""

    min_p: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    @property
    def any(self) -> jax.Array:
        """Whether one of them can."""
        return self.min_p | self.top_k | self.top_p


def asked(min_p: jax.Array, top_k: jax.Array, top_p: jax.Array, vocab: int) -> Asked:
    """Reads it off the settings, scalars or [L]; see ``api.truncation_threshold``."""
    return Asked(min_p > 0, (top_k > 0) & (top_k < vocab), top_p < 1)
