"""Causal grouped-query attention of ragged queries over paged keys and values."""

from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, paged_attention
from pallas_kernels.paged_attention.batch import (
    AttentionBatch,
    PlanSizes,
    decode_places,
    plan_decode,
    plan_sizes,
    plan_tiles,
)
from pallas_kernels.paged_attention.variant import Variant

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionBatch",
    "PlanSizes",
    "Variant",
    "decode_places",
    "paged_attention",
    "plan_decode",
    "plan_sizes",
    "plan_tiles",
]
