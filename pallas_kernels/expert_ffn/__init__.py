"""The feed-forward networks of a mixture of experts, each token through those chosen for it."""

from pallas_kernels.expert_ffn.api import IMPLEMENTATIONS, expert_ffn

__all__ = ["IMPLEMENTATIONS", "expert_ffn"]
