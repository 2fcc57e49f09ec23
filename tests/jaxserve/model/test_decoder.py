"""The decoder as a pure function: full-size shapes without memory, chunks, padding, ties."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import open_checkpoint
from jaxserve.distributed import make_mesh
from jaxserve.model import decoder, ffn, kv_cache, params
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeScaling,
    RopeSpec,
    RouterSpec,
)
from jaxserve.quant import linear
from pallas_kernels.dispatch import Kernels
from pallas_kernels.expert_ffn import reference
from tests.helpers.checkpoints import make_checkpoint, prompt
from tests.helpers.dense import PAGE_SIZE, dense_logits, prompt_inputs, zero_cache
from tests.helpers.loading import load

NORM = NormSpec("rms", 1e-5)
ROPE = RopeSpec(500000.0, 128, RopeScaling("llama3", 8.0, 8192))
LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    max_model_len=131072,
    layers=(LayerSpec(AttentionSpec(32, 8, 128, 128**-0.5, ROPE), MLPSpec(14336, "silu"), NORM),)
    * 32,
    final_norm=NORM,
    tie_word_embeddings=False,
    embedding_size=4096,
    dtype="bfloat16",
)


def test_llama_3_1_8b_has_its_published_size() -> None:
    tree = decoder.declare(LLAMA_8B)
    assert sum(param.size for param in tree.values()) == 8_030_261_248
    assert kv_cache.bytes_per_page(LLAMA_8B, 16, jnp.dtype("bfloat16")) == 16 * 131072


def test_llama_3_1_8b_traces_without_memory() -> None:
    before = len(jax.live_arrays())
    weights = params.abstract(decoder.declare(LLAMA_8B), jnp.dtype("bfloat16"))
    inputs = jax.eval_shape(lambda: prompt_inputs(LLAMA_8B, [1] * 64))
    page = jax.ShapeDtypeStruct((5000, 8, 16, 128), jnp.bfloat16)
    cache = ((page, page),) * 32
    logits, new_cache = jax.eval_shape(
        functools.partial(decoder.forward, LLAMA_8B), weights, cache, inputs
    )
    assert (logits.shape, logits.dtype) == ((64, 128256), jnp.float32)
    assert new_cache == cache
    assert len(jax.live_arrays()) <= before + 1


@pytest.mark.parametrize("case", ["llama-gqa", "mistral-window", "opt-125m"])
def test_a_token_sees_what_comes_before_it_only(case: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, case))
    weights, ids = load(checkpoint), prompt(case)
    whole = dense_logits(checkpoint.config, weights, ids)
    changed = dense_logits(checkpoint.config, weights, [*ids[:-1], ids[-1] ^ 1])
    np.testing.assert_allclose(changed[:-1], whole[:-1], atol=1e-5)
    assert np.abs(changed[-1] - whole[-1]).max() > 1e-2


def test_a_windowed_token_forgets(tmp_path: Path) -> None:
    """Two layers of window 5: the last token knows of eight tokens before it, and no more."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "mistral-window"))
    weights, ids = load(checkpoint), prompt("mistral-window")
    last = dense_logits(checkpoint.config, weights, ids)[-1]
    for back, matters in ((9, False), (8, True)):
        other = ids.copy()
        other[-1 - back] ^= 1
        changed = dense_logits(checkpoint.config, weights, other)[-1]
        assert (np.abs(changed - last).max() > 1e-5) == matters


def test_two_calls_with_a_cut_between_them_give_the_same_logits(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "llama-gqa"))
    config, weights, ids = checkpoint.config, load(checkpoint), prompt("llama-gqa")
    whole = dense_logits(config, weights, ids)
    cut = 11
    cache = zero_cache(config, 4, PAGE_SIZE, jnp.dtype("float32"), make_mesh(1))
    first, cache = decoder.forward(config, weights, cache, prompt_inputs(config, ids[:cut]))
    inputs = prompt_inputs(config, ids)
    count = len(ids) - cut
    rest = dataclasses.replace(
        inputs,
        token_ids=inputs.token_ids[cut:],
        positions=inputs.positions[cut:],
        rope_lengths=inputs.rope_lengths[cut:],
        write_page=inputs.write_page[:, cut:],
        write_slot=inputs.write_slot[cut:],
        sample_index=jnp.arange(count),
        attention=dataclasses.replace(inputs.attention, query_len=jnp.array([count])),
    )
    second, _ = decoder.forward(config, weights, cache, rest)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=1e-5)


def test_padding_is_sent_to_no_experts() -> None:
    chosen = []

    def spy(x: jax.Array, experts: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
        jax.debug.callback(lambda array: chosen.append(np.asarray(array)), experts)
        return reference.expert_ffn(x, experts, *arguments, **options)

    moe = MoESpec(8, 16, RouterSpec(2))
    layer = LayerSpec(AttentionSpec(2, 1, 16, 0.25), moe, NORM)
    config = ModelConfig("Test", 50, 32, 64, (layer,), NORM, False, 32)
    weights = {path: jnp.ones(p.shape) for path, p in decoder.declare(config).items()}
    inputs = prompt_inputs(config, [1] * 8)
    attention = dataclasses.replace(
        inputs.attention, query_len=jnp.array([5]), kv_len=jnp.array([5])
    )
    cache = zero_cache(config, 2, PAGE_SIZE, jnp.dtype("float32"), make_mesh(1))
    inputs = dataclasses.replace(inputs, attention=attention)
    decoder.forward(config, weights, cache, inputs, Kernels(expert_ffn=spy))
    jax.effects_barrier()
    (experts,) = chosen
    assert (experts[:5] >= 0).all() and (experts[5:] == -1).all()


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_feed_forward_network_follows_its_formula(kind: str, gated: bool, bias: bool) -> None:
    import torch

    spec = MLPSpec(12, kind, gated, up_bias=bias, down_bias=bias)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(param.shape).astype(np.float32)
        for name, param in ffn.declare(spec, 8).items()
    }
    x = rng.standard_normal((5, 8)).astype(np.float32)
    functions = torch.nn.functional
    activation = {
        "silu": functions.silu,
        "gelu": functions.gelu,
        "gelu_tanh": functools.partial(functions.gelu, approximate="tanh"),
        "relu": functions.relu,
    }[kind]
    up = np.einsum("th,psh->tps", x, weights["up"]) + (weights["up_bias"] if bias else 0)
    h = activation(torch.from_numpy(up[:, 0].copy())).numpy() * (up[:, 1] if gated else 1)
    want = h @ weights["down"].T + (weights["down_bias"] if bias else 0)
    terms = ffn.apply(spec, {name: jnp.asarray(w) for name, w in weights.items()}, jnp.asarray(x))
    np.testing.assert_allclose(terms.sum(0), want, atol=1e-4)


def test_linear_contracts_all_input_axes_and_sums_in_float32() -> None:
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in ((0, (5, 3, 4)), (1, (2, 7, 3, 4))))
    np.testing.assert_allclose(linear(x, w), jnp.einsum("tab,ouab->tou", x, w), atol=1e-5)
    # 4097 ones: bfloat16 partial sums would stop at 256.
    ones = jnp.ones((1, 4097), jnp.bfloat16)
    assert linear(ones, ones, out_dtype=jnp.float32)[0, 0] == 4097
    assert linear(ones, ones).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="doesn't fit the weight"):
        linear(x, w[..., :3])
