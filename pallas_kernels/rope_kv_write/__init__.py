"""Between the QKV projection and attention: head norms, rotary embedding, and the KV write."""

from pallas_kernels.rope_kv_write.api import IMPLEMENTATIONS, rope_kv_write
from pallas_kernels.rope_kv_write.reference import rotate
from pallas_kernels.rope_kv_write.types import HeadNorm

__all__ = ["IMPLEMENTATIONS", "HeadNorm", "rope_kv_write", "rotate"]
