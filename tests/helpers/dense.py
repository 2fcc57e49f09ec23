"""Runs the decoder over one whole prompt, with pages in a row: the model without the engine."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.model import decoder, kv_cache
from jaxserve.model.config import ModelConfig
from jaxserve.model.inputs import StepInputs
from jaxserve.model.params import Params
from pallas_kernels.paged_attention import AttentionBatch, plan_decode, plan_sizes, plan_tiles

PAGE_SIZE = 16


def zero_cache(*args: Any) -> kv_cache.KVCache:
    """A zeroed cache; the arguments are those of ``kv_cache.shapes``."""
    make = lambda aval: jnp.zeros(aval.shape, aval.dtype, device=aval.sharding)  # noqa: E731
    return jax.tree.map(make, kv_cache.shapes(*args))


def prompt_inputs(config: ModelConfig, token_ids: list[int]) -> StepInputs:
    """One lane that holds the whole prompt and samples from every token."""
    tokens = len(token_ids)
    position = np.arange(tokens, dtype=np.int32)
    group = max(s.attention.num_heads // s.attention.num_kv_heads for s in config.layers)
    sizes = plan_sizes(1, tokens + 1, group, split=False)
    length, tables = np.array([tokens], np.int32), len(config.page_groups.windows)
    decode = plan_decode(length, length, sizes)
    batch = AttentionBatch(
        row=jnp.zeros(1, jnp.int32),
        query_start=jnp.zeros(1, jnp.int32),
        query_len=jnp.asarray(length),
        kv_len=jnp.asarray(length),
        tile_tokens=sizes.tile_tokens,
        **{name: jnp.asarray(array) for name, array in plan_tiles(length, length, sizes).items()},
        **{name: jnp.stack([array] * tables) for name, array in decode.items()},
    )
    pages = -(-tokens // PAGE_SIZE)
    first = 1 + pages * np.arange(tables, dtype=np.int32)  # each table's pages lie in a row
    return StepInputs(
        token_ids=jnp.asarray(token_ids, jnp.int32),
        positions=jnp.asarray(position),
        rope_lengths=jnp.full(tokens, tokens, jnp.int32),
        write_page=jnp.asarray(first[:, None] + position // PAGE_SIZE),
        write_slot=jnp.asarray(position % PAGE_SIZE),
        sample_index=jnp.asarray(position),
        page_table=jnp.asarray(first[:, None, None] + np.arange(pages, dtype=np.int32)),
        attention=batch,
    )


def dense_logits(config: ModelConfig, params: Params, token_ids: list[int]) -> np.ndarray:
    """float32 logits [T, vocab] after each token of the prompt, on one device."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    dtype = params["embed/tokens"].dtype
    inputs = prompt_inputs(config, token_ids)
    cache = zero_cache(config, inputs.page_table.size + 1, PAGE_SIZE, dtype, mesh)
    forward = jax.jit(decoder.forward, static_argnums=0)
    logits, _ = forward(config, params, cache, inputs)
    return np.asarray(logits)
