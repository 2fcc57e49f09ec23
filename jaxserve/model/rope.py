"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scalings."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.model.config import RopeScaling, RopeSpec

CosSin = tuple[jax.Array, jax.Array]


def inverse_frequencies(spec: RopeSpec) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [rotary_size / 2].

    "dynamic" gives the unscaled frequencies; ``cos_sin`` scales them by each token's length.
    """
    exponent = np.arange(0, spec.rotary_size, 2, dtype=np.float32) / spec.rotary_size
    base = (1.0 / spec.theta**exponent).astype(np.float32)
    scaling = spec.scaling
    if scaling is None or scaling.kind == "dynamic":
        return base
    if scaling.kind == "linear":
        return base / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        return _llama3(base, scaling)
    return _yarn(base, spec.theta, spec.rotary_size, scaling)


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    turns = scaling.original_max_len * base / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return (1 - blend) * base / np.float32(scaling.factor) + blend * base


def _yarn(base: np.ndarray, theta: float, size: int, scaling: RopeScaling) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2: a ramp between two dimensions."""

    def dimension(rotations: float) -> float:
        turns = scaling.original_max_len / (rotations * 2 * math.pi)
        return size * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    pairs = np.arange(size // 2, dtype=np.float32)
    ramp = np.clip((pairs - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return base / np.float32(scaling.factor) * ramp + base * (1 - ramp)


def cos_sin(spec: RopeSpec, positions: jax.Array, lengths: jax.Array) -> CosSin:
    """Cosines and sines for ``rope_kv_write``, each float32 [T, rotary_size / 2].

    Args:
        positions: int32 [T].
        lengths: int32 [T], the length by which "dynamic" scales a token: its prompt's length, or
            position + 1 once that is larger. Other kinds don't read it.
    """
    frequencies = jnp.asarray(inverse_frequencies(spec))[None, :]
    scaling = spec.scaling
    if scaling is not None and scaling.kind == "dynamic":
        # theta * (factor * length / original - (factor - 1)) ** (d / (d - 2)), length >= original
        length = jnp.maximum(lengths, scaling.original_max_len).astype(jnp.float32)
        growth = scaling.factor * length / scaling.original_max_len - (scaling.factor - 1)
        size = spec.rotary_size
        exponent = jnp.arange(0, size, 2, dtype=jnp.float32) / size
        theta = spec.theta * growth ** (size / (size - 2))
        frequencies = 1.0 / theta[:, None] ** exponent[None, :]
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    factor = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor
