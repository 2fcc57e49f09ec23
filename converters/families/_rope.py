"""Reads rotary embedding settings as transformers does (modeling_rope_utils.py, version 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from converters.fields import Fields
from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.model.config import RopeScaling, RopeSpec

_KINDS = {
    kind: kind
    for kind in ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "telechat3-yarn")
} | {"su": "longrope"}


def read(
    fields: Fields,
    head_size: int,
    max_positions: int,
    default_theta: float = 10000.0,
    default_partial: float | None = None,
) -> tuple[RopeSpec, int]:
    """The rope settings, and the longest sequence that they allow.

    The settings stand under "rope_parameters" (transformers 5) or "rope_scaling" (before), their
    kind under "rope_type" or "type". Linear, dynamic and yarn scaling extend the context to
    ``factor`` times the original; llama3's and longrope's max_position_embeddings is the extended
    one already.

    Args:
        max_positions: max_position_embeddings.
        default_theta: rope_theta where there is none.
        default_partial: partial_rotary_factor where there is none; None for families that rotate
            whole heads only.

    Raises:
        CheckpointError: a value is missing or makes no sense.
        UnsupportedModelError: another kind of rope.
    """
    settings = fields.section("rope_scaling") or fields.section("rope_parameters")
    settings = settings or Fields({}, f"{fields.where}: rope_parameters")
    if "full_attention" in settings or "sliding_attention" in settings:
        raise UnsupportedModelError(f"{settings.where}: one rope per layer type is not supported.")
    theta = settings.number("rope_theta", None, above=1.0)
    if theta is None:
        theta = fields.number("rope_theta", default_theta, above=1.0)
    size = _rotary_size(fields, settings, head_size, default_partial)
    return _scaled(fields, settings, theta, size, max_positions)


def read_by_layer_type(
    fields: Fields,
    head_size: int,
    max_positions: int,
    thetas: Mapping[str, tuple[str, float]],
) -> dict[str, RopeSpec]:
    """The ropes of a model that has one for each of its "layer_types".

    They stand in sections of "rope_parameters" (transformers 5). Before, there was a key for each
    theta, and "rope_scaling" was that of the type "full_attention".

    Args:
        max_positions: max_position_embeddings, extended already.
        thetas: for each layer type, the old key of its theta and the default.

    Raises:
        CheckpointError: a value is missing or makes no sense.
        UnsupportedModelError: another kind of rope.
    """
    sections = fields.section("rope_parameters")
    ropes = {}
    for layer_type, (key, default) in thetas.items():
        settings = fields.section("rope_scaling") if layer_type == "full_attention" else None
        if sections is not None:
            settings = sections.section(layer_type)
            if settings is None:
                raise sections.wrong(layer_type, "a JSON object, the rope of those layers")
        settings = settings or Fields({}, f"{fields.where}: rope_parameters")
        theta = settings.number("rope_theta", None, above=1.0)
        if theta is None:
            theta = fields.number(key, default, above=1.0)
        size = _rotary_size(fields, settings, head_size, None)
        ropes[layer_type] = _scaled(fields, settings, theta, size, max_positions)[0]
    return ropes


def _rotary_size(fields: Fields, settings: Fields, head_size: int, default: float | None) -> int:
    """Dimensions of a head that are rotated, rounded down as in transformers."""
    place = settings if "partial_rotary_factor" in settings else fields
    usual = 1.0 if default is None else default
    factor = place.number("partial_rotary_factor", usual, maximum=1.0)
    if default is None and factor != 1.0:
        raise UnsupportedModelError(
            f"{place.where}: partial_rotary_factor other than 1 is not supported."
        )
    size = int(head_size * factor)
    if size % 2 or not size:
        part = "" if factor == 1.0 else f" times a partial_rotary_factor of {factor:g}"
        raise CheckpointError(
            f"{fields.where}: rope needs an even head size, not {head_size}{part}."
        )
    return size


def _scaled(
    fields: Fields, settings: Fields, theta: float, size: int, max_positions: int
) -> tuple[RopeSpec, int]:
    """The rope of these settings, and the longest sequence that it allows."""
    kind = settings.choice("rope_type" if "rope_type" in settings else "type", _KINDS, "default")
    if kind == "default":
        return RopeSpec(theta, size), max_positions
    original = fields.integer("original_max_position_embeddings", None)
    if original is None:
        original = settings.integer("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        return RopeSpec(theta, size, _llama3(settings, original)), max_positions
    if kind == "longrope":
        scaling = _longrope(settings, size, original, max_positions)
        return RopeSpec(theta, size, scaling), max_positions
    if kind == "yarn":
        scaling = _yarn(settings, original, max_positions)
    elif kind == "telechat3-yarn":
        scaling = _telechat3(settings, original, max_positions)
    else:
        if kind == "dynamic" and size < 4:  # its exponent divides by size - 2
            raise CheckpointError(f"{fields.where}: dynamic rope needs a head size of at least 4.")
        scaling = RopeScaling(kind, settings.number("factor"), max_positions)  # type: ignore[arg-type]
    longest = int(scaling.original_max_len * scaling.factor)
    return RopeSpec(theta, size, scaling), max(longest, 1)


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


def _telechat3(settings: Fields, original: int, max_positions: int) -> RopeScaling:
    """YaRN as in TeleChat3's modeling_telechat3.py: where there is an original length, the factor
    follows from it whatever "factor" says, and scores grow more slowly."""
    factor = settings.number("factor") if original == max_positions else max_positions / original
    given = Fields({**settings.values, "factor": factor}, settings.where)
    return _yarn(given, original, max_positions, slope=0.07)


def _yarn(settings: Fields, original: int, max_positions: int, slope: float = 0.1) -> RopeScaling:
    factor = settings.number("factor", None)
    factor = factor if factor is not None else max_positions / original
    attention_factor = settings.number("attention_factor", None)
    if attention_factor is None:
        mscale = settings.number("mscale", 0.0, or_zero=True)
        all_dim = settings.number("mscale_all_dim", 0.0, or_zero=True)
        attention_factor = magnitude(factor, slope)
        if mscale and all_dim:
            parts = [magnitude(factor, slope * scale) for scale in (mscale, all_dim)]
            attention_factor = parts[0] / parts[1]
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=settings.number("beta_fast", 0.0, or_zero=True) or 32.0,
        beta_slow=settings.number("beta_slow", 0.0, or_zero=True) or 1.0,
        truncate=settings.boolean("truncate", True),
        attention_factor=attention_factor,
    )


def _longrope(settings: Fields, size: int, original: int, max_positions: int) -> RopeScaling:
    factor = settings.number("factor", None)
    factor = factor if factor is not None else max_positions / original
    attention_factor = settings.number("attention_factor", None)
    if attention_factor is None:
        growth = math.log(factor) / math.log(original) if factor > 1 and original > 1 else 0.0
        attention_factor = math.sqrt(1 + growth)

    def divisors(key: str) -> tuple[float, ...]:
        values = settings.numbers(key)
        if len(values) != size // 2:
            raise settings.wrong(key, f"{size // 2} numbers, one for each rotated pair")
        return tuple(values)

    return RopeScaling(
        "longrope",
        factor,
        original,
        attention_factor=attention_factor,
        short_factors=divisors("short_factor"),
        long_factors=divisors("long_factor"),
    )


def magnitude(factor: float, slope: float) -> float:
    """YaRN, section 3.4: scores grow with the logarithm of the extension."""
    return 1.0 if factor <= 1 else slope * math.log(factor) + 1.0
