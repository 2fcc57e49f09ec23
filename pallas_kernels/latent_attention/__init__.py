"""Causal attention of many heads over one paged key that all of them share, whose first part is the
value: multi-head latent attention with its maps absorbed."""

from pallas_kernels.latent_attention.api import IMPLEMENTATIONS, latent_attention

__all__ = ["IMPLEMENTATIONS", "latent_attention"]
