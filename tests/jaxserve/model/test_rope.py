"""Rotary positions against transformers' own functions, and rotation itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from converters.families import llama
from jaxserve.model import rope
from jaxserve.model.config import RopeScaling, RopeSpec
from pallas_kernels.rope_kv_write import rope_kv_write

HEAD_SIZE, ORIGINAL = 64, 2048
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn, original length": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 512,
    },
    "yarn, mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.3},
    "yarn, one mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 3},
    "yarn, not truncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    "yarn, factor given": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    "yarn, large theta": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
    "llama3": LLAMA31,
    "llama3, other bands": LLAMA31 | {"low_freq_factor": 2.0, "high_freq_factor": 32.0},
}


def rotate(x: jax.Array, cos_sin: rope.CosSin) -> jax.Array:
    """x [T, heads, size] as the queries and keys of an attention layer are rotated."""
    tokens, heads, size = x.shape
    pages = jnp.zeros((tokens, heads, 1, size), x.dtype)
    places = jnp.arange(tokens), jnp.zeros(tokens, int)
    qkv = jnp.stack([x] * 3, axis=2)[None]
    q, keys, values = rope_kv_write(qkv, cos_sin, None, pages, pages, *places, dtype=x.dtype)
    np.testing.assert_array_equal(keys[:, :, 0], q)
    np.testing.assert_array_equal(values[:, :, 0], x)
    return q


def both(
    settings: dict[str, Any], seq_len: int | None = None
) -> tuple[RopeSpec, np.ndarray, float]:
    """Our spec, and transformers' frequencies and factor, for the same config.json."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 4 * HEAD_SIZE,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": ORIGINAL,
        "rope_parameters": {"rope_theta": 10000.0} | settings,
    }
    (spec,) = llama.config(config).rope_specs
    hf = LlamaConfig(
        **{k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](
        hf, torch.device("cpu"), seq_len=seq_len
    )
    return spec, frequencies.numpy(), factor


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(name: str) -> None:
    spec, frequencies, factor = both(SCALINGS[name])
    ours = rope.inverse_frequencies(spec)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, frequencies, rtol=1e-6)
    assert spec.scaling.attention_factor == pytest.approx(factor)
    positions = jnp.array([0, 1, 100, 5000])
    cos, sin = rope.cos_sin(spec, positions, positions + 1)
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angles) * factor, atol=2e-3)
    np.testing.assert_allclose(sin, np.sin(angles) * factor, atol=2e-3)


@pytest.mark.parametrize("length", [1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 5000, 4 * ORIGINAL])
def test_dynamic_frequencies_grow_with_the_length(length: int) -> None:
    spec, frequencies, factor = both({"rope_type": "dynamic", "factor": 4.0}, length)
    assert factor == 1.0
    # At position 1 the angles are the frequencies.
    cos, sin = rope.cos_sin(spec, jnp.array([1]), jnp.array([length]))
    np.testing.assert_allclose(np.arctan2(sin[0], cos[0]), frequencies, rtol=2e-5)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + 0.1 * pair for pair in range(HEAD_SIZE // 2)],
    "long_factor": [1.5 * (pair + 1) for pair in range(HEAD_SIZE // 2)],
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize("length", [1, 511, 512, 513, 2048])
def test_longrope_has_other_frequencies_for_all_tokens_of_long_requests(length: int) -> None:
    spec, frequencies, factor = both(LONGROPE, length)
    assert spec.scaling.attention_factor == pytest.approx(factor)
    np.testing.assert_allclose(rope.inverse_frequencies(spec, length > 512), frequencies, rtol=1e-6)
    positions = jnp.array([1, 100, 511, 512])
    cos, sin = rope.cos_sin(spec, positions, jnp.full(4, length))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angles) * factor, atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angles) * factor, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt_len", "alpha"), [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (32768, 31)]
)
def test_qwens_frequencies_shrink_in_steps_with_the_prompt(prompt_len: int, alpha: int) -> None:
    """2 ** ceil(log2(n / 2048) + 1) - 1, whatever has been generated since."""
    spec = RopeSpec(10000.0, 8, RopeScaling("qwen", 1.0, 2048))
    want = (10000.0 * alpha ** (8 / 6)) ** -(np.arange(0, 8, 2) / 8)
    for position in (1, 3000):
        cos, sin = rope.cos_sin(spec, jnp.array([position]), jnp.array([prompt_len]))
        angles = np.exp(1j * position * want)
        np.testing.assert_allclose(cos[0] + 1j * sin[0], angles, atol=1e-3)


def test_dynamic_lengths_differ_from_token_to_token() -> None:
    spec, _, _ = both({"rope_type": "dynamic", "factor": 4.0})
    lengths = jnp.array([10, 3000, 8000])
    together = rope.cos_sin(spec, jnp.full(3, 7), lengths)
    for index in range(3):
        alone = rope.cos_sin(spec, jnp.array([7]), lengths[index : index + 1])
        np.testing.assert_allclose(together[0][index], alone[0][0], rtol=1e-6)


def test_positions_up_to_the_longest_stay_exact_enough() -> None:
    """float32 angles at 130,000 are off by less than a hundredth of a turn."""
    spec, frequencies, _ = both(LLAMA31)
    cos, _ = rope.cos_sin(spec, jnp.array([131071]), jnp.array([131072]))
    want = np.cos(131071 * frequencies.astype(np.float64))
    np.testing.assert_allclose(cos[0], want, atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rotary_size", [8, 4])
def test_rotation_turns_each_pair_and_leaves_the_rest(dtype: str, rotary_size: int) -> None:
    spec = RopeSpec(100.0, rotary_size)
    x = jax.random.normal(jax.random.key(0), (5, 3, 8)).astype(dtype)
    positions = jnp.array([0, 1, 2, 9, 30])
    cos_sin = rope.cos_sin(spec, positions, positions + 1)
    out = rotate(x, cos_sin)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    half = rotary_size // 2
    wide = np.asarray(x, np.float64)
    turned = (wide[..., :half] + 1j * wide[..., half:rotary_size]) * np.exp(
        1j * np.asarray(positions)[:, None, None] * np.array(rope.inverse_frequencies(spec))
    )
    want = np.concatenate([turned.real, turned.imag, wide[..., rotary_size:]], axis=-1)
    atol = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=atol)
    np.testing.assert_array_equal(out[0], x[0])  # position 0


def test_scores_depend_on_the_distance_only() -> None:
    spec = RopeSpec(10000.0, 16, RopeScaling("linear", 2.0, 64))
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 16))

    def score(query_at: int, key_at: int) -> float:
        def turn(x: jax.Array, at: int) -> jax.Array:
            position = jnp.array([at])
            return rotate(x, rope.cos_sin(spec, position, position + 1))

        return float((turn(q, query_at) * turn(k, key_at)).sum())

    assert score(17, 5) == pytest.approx(score(112, 100), abs=1e-4)
    assert score(17, 5) != pytest.approx(score(17, 6), abs=1e-4)
