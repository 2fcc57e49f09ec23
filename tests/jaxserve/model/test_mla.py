"""Latent attention: the absorbed form against the published formula, cut prompts, devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.distributed import LOGICAL_TO_MESH, make_mesh
from jaxserve.model import decoder, kv_cache, mla, params, rope
from jaxserve.model.config import (
    LatentAttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    NormSpec,
    RopeScaling,
    RopeSpec,
)
from jaxserve.model.inputs import StepInputs
from pallas_kernels.paged_attention import plan_decode, plan_sizes, plan_tiles
from tests.helpers.dense import PAGE_SIZE, prompt_inputs, zero_cache

HIDDEN, TOKENS = 24, 37
NORM = NormSpec("rms", 1e-6)
SPEC = LatentAttentionSpec(
    num_heads=4,
    latent_size=20,
    nope_size=10,
    rope_size=6,
    value_size=7,
    scale=0.3,
    rope=RopeSpec(100.0, 6, RopeScaling("yarn", 4.0, 16, attention_factor=1.2)),
    norm=NORM,
)
SPECS = {
    "queries without latents": SPEC,
    "latent queries": dataclasses.replace(SPEC, query_latent_size=9),
    "biases": dataclasses.replace(SPEC, query_latent_size=9, bias=True),
}


def model(spec: LatentAttentionSpec) -> ModelConfig:
    return ModelConfig(
        architecture="Test",
        vocab_size=64,
        hidden_size=HIDDEN,
        max_model_len=64,
        layers=(LayerSpec(spec, MLPSpec(16, "silu"), NORM),) * 2,
        final_norm=NORM,
        tie_word_embeddings=True,
        embedding_size=HIDDEN,
    )


def random_weights(tree: dict[str, params.Param]) -> params.Params:
    rng = np.random.default_rng(3)

    def make(shape: tuple[int, ...]) -> jax.Array:
        scale = 0.3 if len(shape) > 1 else 1.0
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    return {path: make(param.shape) for path, param in tree.items()}


def ids() -> list[int]:
    return np.random.default_rng(1).integers(0, 64, TOKENS).tolist()


def plain(spec: LatentAttentionSpec, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """DeepSeek-V2 (arXiv:2405.04434), equations 9 to 13 and 37 to 47, in float64: keys and values
    of every head are made of the latents. x [T, hidden]."""

    def normalized(h: np.ndarray, name: str) -> np.ndarray:
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}/scale"]

    positions = jnp.arange(len(x))
    cos, sin = (np.asarray(a, np.float64) for a in rope.cos_sin(spec.rope, positions, positions))

    def rotated(h: np.ndarray) -> np.ndarray:
        """Pairs (i, i + rope_size / 2) of h [T, heads, rope_size]."""
        a, b = np.split(h, 2, -1)
        c, s = cos[:, None], sin[:, None]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    if spec.query_latent_size is None:
        q = np.einsum("ti,hdi->thd", x, w["q"])
    else:
        latent = normalized(x @ w["q_down"].T + w.get("q_down_bias", 0), "q_norm")
        q = np.einsum("ti,hdi->thd", latent, w["q_up"])
    kv = x @ w["kv_down"].T + w.get("kv_down_bias", 0)
    latent = normalized(kv[:, : spec.latent_size], "kv_norm")
    k_rope = rotated(kv[:, None, spec.latent_size :])
    k = np.einsum("tl,hdl->thd", latent, w["k_up"])
    k = np.concatenate([k, np.broadcast_to(k_rope, (*k.shape[:2], spec.rope_size))], -1)
    v = np.einsum("tl,hdl->thd", latent, w["v_up"])
    q = np.concatenate([q[..., : spec.nope_size], rotated(q[..., spec.nope_size :])], -1)
    scores = np.einsum("qhd,khd->hqk", q, k) * spec.scale
    scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    o = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
    return np.einsum("qhd,ohd->qo", o, w["out"]) + w.get("out_bias", 0)


@pytest.mark.parametrize("name", SPECS)
def test_absorbing_the_maps_changes_nothing(name: str) -> None:
    spec = SPECS[name]
    weights = random_weights(mla.declare(spec, HIDDEN))
    x = np.random.default_rng(5).standard_normal((TOKENS, HIDDEN))
    inputs = prompt_inputs(model(spec), ids())
    ((cache,), _) = zero_cache(model(spec), 4, PAGE_SIZE, jnp.dtype("float32"), make_mesh(1))
    cos_sin = rope.cos_sin(spec.rope, inputs.positions, inputs.rope_lengths)
    terms, _ = mla.apply(
        spec, weights, jnp.asarray(x, jnp.float32), (cache,), inputs.of_table(0), cos_sin
    )
    want = plain(spec, {k: np.asarray(v, np.float64) for k, v in weights.items()}, x)
    np.testing.assert_allclose(terms.sum(0), want, atol=2e-5 * np.abs(want).max())


def part(inputs: StepInputs, start: int, stop: int) -> StepInputs:
    """The tokens ``start : stop`` of a prompt in one lane."""
    per_token = ("token_ids", "positions", "rope_lengths", "write_slot")
    lengths = {"query_len": np.array([stop - start]), "kv_len": np.array([stop])}
    sizes = plan_sizes(1, stop - start, SPEC.num_heads, split=False)
    decode = {name: array[None] for name, array in plan_decode(**lengths, sizes=sizes).items()}
    arrays = {**lengths, **plan_tiles(**lengths, sizes=sizes), **decode}
    batch = dataclasses.replace(
        inputs.attention,
        tile_tokens=sizes.tile_tokens,
        **{name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()},
    )
    return dataclasses.replace(
        inputs,
        **{name: getattr(inputs, name)[start:stop] for name in per_token},
        write_page=inputs.write_page[:, start:stop],
        sample_index=jnp.arange(stop - start),
        attention=batch,
    )


@pytest.mark.parametrize("cut", [1, 17, 36])
def test_a_prompt_may_be_cut_anywhere(cut: int) -> None:
    config = model(SPEC)
    weights = random_weights(decoder.declare(config))
    cache = zero_cache(config, 4, PAGE_SIZE, jnp.dtype("float32"), make_mesh(1))
    inputs = prompt_inputs(config, ids())
    forward = jax.jit(functools.partial(decoder.forward, config))
    whole, _ = forward(weights, cache, inputs)
    first, cache = forward(weights, cache, part(inputs, 0, cut))
    second, _ = forward(weights, cache, part(inputs, cut, TOKENS))
    np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_devices_share_out_the_heads_and_hold_the_same_latents(size: int) -> None:
    config = decoder.for_tensor_parallel(model(SPECS["biases"]), size)
    tree = decoder.declare(config)
    weights, inputs = random_weights(tree), prompt_inputs(config, ids())

    def run(devices: int) -> tuple[jax.Array, kv_cache.KVCache]:
        mesh = make_mesh(devices)
        specs = params.partition_specs(tree, LOGICAL_TO_MESH, dict(mesh.shape))
        parts = kv_cache.partitions(config)
        step = jax.shard_map(
            lambda *arguments: decoder.forward(config, *arguments),
            mesh=mesh,
            in_specs=(specs, parts, PartitionSpec()),
            out_specs=(PartitionSpec(None, specs["embed/tokens"][0]), parts),
            check_vma=False,
        )
        cache = zero_cache(config, 4, PAGE_SIZE, jnp.dtype("float32"), mesh)
        return jax.jit(step)(weights, cache, inputs)

    (logits, cache), (one_logits, one_cache) = run(size), run(1)
    np.testing.assert_allclose(logits, one_logits, atol=1e-5)
    for (pages,), (one_pages,) in zip(cache, one_cache, strict=True):
        for shard in pages.addressable_shards:
            np.testing.assert_allclose(shard.data, one_pages, atol=1e-5)
