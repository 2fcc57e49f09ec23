"""The TPU kernels compiled by TPUs' own compiler, which finds what lowering doesn't: wrong tiles,
too little memory, copied pools. It needs no TPU, but the package libtpu (``jaxserve[tpu]``)."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from pallas_kernels.paged_attention import AttentionBatch, mosaic_tpu, plan_sizes
from pallas_kernels.rope_kv_write import mosaic_tpu as kv_write

pytest.importorskip("libtpu")
ALONE = {  # else it asks Google's cloud what machine this is
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
PAGES, ROWS, COLUMNS = 4096, 64, 8192


@functools.cache
def device(topology: str) -> Any:
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology, platform="tpu").devices[0]


def compiled(topology: str, function: Any, *avals: Any, donated: tuple[int, ...]) -> Any:
    chip = device(topology)
    sharding = SingleDeviceSharding(chip)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    abstract = AbstractDevice(device_kind=chip.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        traced = jax.jit(function, donate_argnums=donated).trace(*jax.tree.map(place, avals))
        return traced.lower().compile()


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def batch_of(tokens: int, group: int) -> AttentionBatch:
    sizes = plan_sizes(ROWS, tokens, group, split=True)
    lengths = {"decode_lane": sizes.decode_items, "tile_lane": sizes.tiles}
    lengths |= {"decode_start": sizes.decode_items, "tile_start": sizes.tiles}
    lengths |= {"decode_end": sizes.decode_items}
    names = AttentionBatch.__dataclass_fields__.keys() - {"tile_tokens"}
    arrays = {name: int32(lengths.get(name, ROWS)) for name in names}
    return AttentionBatch(**arrays, tile_tokens=sizes.tile_tokens)


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1"])
@pytest.mark.parametrize("tokens", [ROWS, 512])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_size", "page_size", "dtype"),
    [
        (8, 4, 128, 16, "bfloat16"),
        (4, 7, 128, 64, "bfloat16"),
        (32, 1, 128, 16, "float32"),
        (8, 2, 256, 16, "bfloat16"),
        (8, 4, 64, 32, "bfloat16"),
        (32, 1, 96, 16, "bfloat16"),
    ],
)
def test_a_layer_compiles(
    topology: str,
    tokens: int,
    kv_heads: int,
    group: int,
    head_size: int,
    page_size: int,
    dtype: str,
) -> None:
    pool = jax.ShapeDtypeStruct((PAGES, kv_heads, page_size, head_size), dtype)
    qkv = jax.ShapeDtypeStruct((1, tokens, kv_heads, group + 2, head_size), dtype)

    def layer(qkv, k_pages, v_pages, page, slot, table, batch):
        q, k_pages, v_pages = kv_write.rope_kv_write(
            qkv, None, None, k_pages, v_pages, page, slot, dtype=jnp.dtype(dtype)
        )
        o = mosaic_tpu.paged_attention(q, k_pages, v_pages, table, batch, scale=0.1)
        return o, k_pages, v_pages

    arguments = (qkv, pool, pool, int32(tokens), int32(tokens), int32(ROWS, COLUMNS))
    program = compiled(topology, layer, *arguments, batch_of(tokens, group), donated=(1, 2))
    if head_size % 128 == 0:  # XLA stores other pools with another axis last, and must copy them
        pool_bytes = PAGES * kv_heads * page_size * head_size * pool.dtype.itemsize
        assert program.memory_analysis().temp_size_in_bytes < pool_bytes // 2
