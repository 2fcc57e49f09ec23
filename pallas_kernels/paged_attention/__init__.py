"""Causal grouped-query attention of ragged queries over paged keys and values."""

from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, paged_attention
from pallas_kernels.paged_attention.batch import AttentionBatch, PlanSizes, plan, plan_sizes
from pallas_kernels.paged_attention.variant import Variant

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionBatch",
    "PlanSizes",
    "Variant",
    "paged_attention",
    "plan",
    "plan_sizes",
]
