"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scalings."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.model.config import RopeScaling, RopeSpec

CosSin = tuple[jax.Array, jax.Array]


def inverse_frequencies(spec: RopeSpec, long: bool = False) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [rotary_size / 2].

    "dynamic" and "qwen" give the unscaled frequencies; ``cos_sin`` scales them by each token's
    length. "longrope" gives those of short requests, or of ``long`` ones.
    """
    exponent = np.arange(0, spec.rotary_size, 2, dtype=np.float32) / spec.rotary_size
    base = (1.0 / spec.theta**exponent).astype(np.float32)
    scaling = spec.scaling
    if scaling is None or scaling.kind in ("dynamic", "qwen"):
        return base
    if scaling.kind == "linear":
        return base / np.float32(scaling.factor)
    if scaling.kind == "longrope":
        factors = scaling.long_factors if long else scaling.short_factors
        return base / np.array(factors, np.float32)
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


def tables(
    specs: Iterable[RopeSpec], positions: jax.Array, lengths: jax.Array
) -> dict[RopeSpec | None, CosSin | None]:
    """``cos_sin`` of every spec; None for layers that rotate nothing."""
    return {None: None} | {spec: cos_sin(spec, positions, lengths) for spec in specs}


def cos_sin(spec: RopeSpec, positions: jax.Array, lengths: jax.Array) -> CosSin:
    """Cosines and sines for ``rope_kv_write``, each float32 [T, rotary_size / 2].

    Args:
        positions: int32 [T].
        lengths: int32 [T], the length of each token's prompt, by which "dynamic" and "qwen" scale.
            "longrope" (Ding et al. 2024, arXiv:2402.13753) has other frequencies for all tokens of
            requests longer than the original length: here stands how long a request was when its
            first key was computed, and one that outgrows the original length begins anew.
    """
    frequencies = jnp.asarray(inverse_frequencies(spec))[None, :]
    scaling = spec.scaling
    if scaling is not None and scaling.kind in ("dynamic", "qwen"):
        size = spec.rotary_size
        exponent = jnp.arange(0, size, 2, dtype=jnp.float32) / size
        theta = spec.theta * _growth(scaling, positions, lengths) ** (size / (size - 2))
        frequencies = 1.0 / theta[:, None] ** exponent[None, :]
    if scaling is not None and scaling.kind == "longrope":
        long = (lengths > scaling.original_max_len)[:, None]
        frequencies = jnp.where(long, inverse_frequencies(spec, long=True), frequencies)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    factor = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _growth(scaling: RopeScaling, positions: jax.Array, lengths: jax.Array) -> jax.Array:
    """By how much each token's longest wavelength grows, float32 [T].

    "dynamic": by its prompt's length n, or its own place once that is further:
    factor * n / original - (factor - 1). "qwen": by the prompt's length alone, in steps:
    2 ** ceil(log2(n / original) + 1) - 1 (get_ntk_alpha of Qwen's modeling_qwen.py). At least 1.
    """
    original = scaling.original_max_len
    if scaling.kind == "dynamic":
        length = jnp.maximum(jnp.maximum(lengths, positions + 1), original).astype(jnp.float32)
        return scaling.factor * length / original - (scaling.factor - 1)
    doubled = np.array([original << i for i in range(31) if original << i < 2**31], np.int32)
    doublings = (lengths[:, None] > doubled).sum(1)
    return 2.0 ** (doublings + 1.0) - 1.0
