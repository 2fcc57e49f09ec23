"""The router of a mixture of experts: which experts each token goes through, and their weights."""

from pallas_kernels.route_experts.api import IMPLEMENTATIONS, route_experts

__all__ = ["IMPLEMENTATIONS", "route_experts"]
