"""Reads rotary embedding settings as transformers does (modeling_rope_utils.py, version 5)."""

from __future__ import annotations

import math

from converters.fields import Fields
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.model.config import RopeScaling, RopeSpec

_KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "yarn", "llama3")}


def read(fields: Fields, head_size: int, max_positions: int) -> tuple[RopeSpec, int]:
    """The rope settings, and the longest sequence that they allow.

    The settings stand under "rope_parameters" (transformers 5) or "rope_scaling" (before), their
    kind under "rope_type" or "type". Linear, dynamic and yarn scaling extend the context to
    ``factor`` times the original; llama3's max_position_embeddings is the extended one already.

    Args:
        max_positions: max_position_embeddings.

    Raises:
        CheckpointError: a value is missing or makes no sense.
        UnsupportedModelError: another kind of rope.
    """
    settings = fields.section("rope_scaling") or fields.section("rope_parameters")
    settings = settings or Fields({}, f"{fields.where}: rope_parameters")
    if "full_attention" in settings or "sliding_attention" in settings:
        raise UnsupportedModelError(f"{settings.where}: one rope per layer type is not supported.")
    for place in (fields, settings):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError(
                f"{place.where}: partial_rotary_factor other than 1 is not supported."
            )
    if head_size % 2:
        raise CheckpointError(f"{fields.where}: rope needs an even head size, not {head_size}.")
    theta = settings.number("rope_theta", None, above=1.0)
    if theta is None:
        theta = fields.number("rope_theta", 10000.0, above=1.0)
    kind = settings.choice("rope_type" if "rope_type" in settings else "type", _KINDS, "default")
    if kind == "default":
        return RopeSpec(theta, head_size), max_positions
    original = fields.integer("original_max_position_embeddings", None)
    if original is None:
        original = settings.integer("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        return RopeSpec(theta, head_size, _llama3(settings, original)), max_positions
    if kind == "yarn":
        scaling = _yarn(settings, original, max_positions)
    else:
        if kind == "dynamic" and head_size < 4:  # its exponent divides by head_size - 2
            raise CheckpointError(f"{fields.where}: dynamic rope needs a head size of at least 4.")
        scaling = RopeScaling(kind, settings.number("factor"), max_positions)  # type: ignore[arg-type]
    longest = int(scaling.original_max_len * scaling.factor)
    return RopeSpec(theta, head_size, scaling), max(longest, 1)


def _llama3(settings: Fields, original: int) -> RopeScaling:
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if high <= low:
        raise settings.wrong("high_freq_factor", f"a number above low_freq_factor, {low:g}")
    return RopeScaling(
        "llama3",
        settings.number("factor"),
        original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(settings: Fields, original: int, max_positions: int) -> RopeScaling:
    factor = settings.number("factor", None)
    factor = factor if factor is not None else max_positions / original
    attention_factor = settings.number("attention_factor", None)
    if attention_factor is None:
        mscale = settings.number("mscale", 0.0, or_zero=True)
        all_dim = settings.number("mscale_all_dim", 0.0, or_zero=True)
        attention_factor = _magnitude(factor)
        if mscale and all_dim:
            attention_factor = _magnitude(factor, mscale) / _magnitude(factor, all_dim)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=settings.number("beta_fast", 0.0, or_zero=True) or 32.0,
        beta_slow=settings.number("beta_slow", 0.0, or_zero=True) or 1.0,
        truncate=settings.boolean("truncate", True),
        attention_factor=attention_factor,
    )


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN, section 3.4: scores grow with the logarithm of the extension."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
