"""Renaming rules: which tensors of a checkpoint become which weights of ours.

A family is data: a Layout of Rules. ``plan`` applies it strictly: every tensor of the checkpoint is
used or named as dropped, and every weight is filled once.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from converters.files import preview
from converters.lazy import Lazy, concatenate, mapped, stack
from jaxserve.errors import CheckpointError
from jaxserve.model.config import ModelConfig
from jaxserve.model.params import Param

FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint under its own name, which messages show."""

    name: str
    array: Lazy

    def expect(self, *shape: int, dtypes: tuple[str, ...] = FLOATS) -> Lazy:
        """The array, whose shape must be this one and whose dtype one of these.

        Raises:
            CheckpointError: they aren't.
        """
        if self.array.dtype.name not in dtypes:
            raise CheckpointError(
                f"tensor {self.name!r} has dtype {self.array.dtype}; expected one of "
                f"{', '.join(dtypes)}. Quantized checkpoints are not supported yet."
            )
        if self.array.shape != shape:
            raise CheckpointError(
                f"tensor {self.name!r} has shape {list(self.array.shape)}, but config.json implies "
                f"{list(shape)}. They belong to different models; download both again."
            )
        return self.array


Transform = Callable[[tuple[Source, ...], Param], Lazy]


def same(sources: tuple[Source, ...], param: Param) -> Lazy:
    """One tensor as it is."""
    return sources[0].expect(*param.shape)


def one_plus(sources: tuple[Source, ...], param: Param) -> Lazy:
    """One plus a tensor, in float32: the scale of Gemma's norms (``NormSpec.wide_scale``)."""
    one = np.float32(1)
    array = sources[0].expect(*param.shape)
    return mapped(array, lambda values: one + values.astype(np.float32), np.dtype(np.float32))


def split_inputs(sources: tuple[Source, ...], param: Param) -> Lazy:
    """[outputs, inputs] -> [outputs, a, b, ...] with a * b * ... = inputs."""
    outputs, *inputs = param.shape
    return sources[0].expect(outputs, math.prod(inputs)).reshape(*param.shape)


def fuse_qkv(sources: tuple[Source, ...], param: Param) -> Lazy:
    """q [heads * D, ...], k and v [kv_heads * D, ...] -> [kv_heads, group + 2, D, ...]."""
    kv_heads, parts, size, *rest = param.shape
    q, k, v = (
        source.expect(kv_heads * heads * size, *rest).reshape(kv_heads, heads, size, *rest)
        for source, heads in zip(sources, (parts - 2, 1, 1), strict=True)
    )
    return concatenate([q, k, v], 1)


def split_qkv(sources: tuple[Source, ...], param: Param) -> Lazy:
    """One tensor of all queries, then all keys, then all values, [(heads + 2 * kv_heads) * D, ...]
    -> [kv_heads, group + 2, D, ...]."""
    kv_heads, parts, size, *rest = param.shape
    whole = sources[0].expect(kv_heads * parts * size, *rest)
    everything = [slice(None)] * len(rest)

    def part(heads: int, before: int) -> Lazy:
        rows = slice(before * kv_heads * size, (before + heads) * kv_heads * size)
        return whole[(rows, *everything)].reshape(kv_heads, heads, size, *rest)

    return concatenate([part(parts - 2, 0), part(1, parts - 2), part(1, parts - 1)], 1)


def split_groups(sources: tuple[Source, ...], param: Param) -> Lazy:
    """One tensor that has each KV head's queries, then its key, then its value,
    [kv_heads * (group + 2) * D, ...] -> [kv_heads, group + 2, D, ...]."""
    kv_heads, parts, size, *rest = param.shape
    return sources[0].expect(kv_heads * parts * size, *rest).reshape(*param.shape)


def stack_parts(sources: tuple[Source, ...], param: Param) -> Lazy:
    """Tensors of one shape [F, ...] -> [parts, F, ...], for example gate and up."""
    return stack([source.expect(*param.shape[1:]) for source in sources])


def split_parts(sources: tuple[Source, ...], param: Param) -> Lazy:
    """One tensor of several parts after each other, [parts * F, ...] -> [parts, F, ...]."""
    parts, size, *rest = param.shape
    return sources[0].expect(parts * size, *rest).reshape(*param.shape)


def stack_experts(sources: tuple[Source, ...], param: Param) -> Lazy:
    """Tensors [F, ...] of all experts, those of one expert after another -> [E, parts, F, ...] or
    [E, F, ...]."""
    parts = len(sources) // param.shape[0]
    shape = param.shape[1:] if parts == 1 else param.shape[2:]
    return stack([source.expect(*shape) for source in sources]).reshape(*param.shape)


def half_split(array: Lazy, axis: int, rotary_size: int) -> Lazy:
    """Brings the first ``rotary_size`` entries of an axis from rotated pairs (2i, 2i + 1) to pairs
    (i, i + rotary_size / 2), see ``RopeSpec``."""
    shape = array.shape

    def part(start: int, stop: int) -> Lazy:
        index = [slice(None)] * len(shape)
        index[axis] = slice(start, stop)
        return array[tuple(index)]

    before, after = shape[:axis], shape[axis + 1 :]
    pairs = part(0, rotary_size).reshape(*before, rotary_size // 2, 2, *after)
    axes = list(range(len(shape) + 1))
    axes[axis], axes[axis + 1] = axis + 1, axis
    halves = pairs.transpose(*axes).reshape(*before, rotary_size, *after)
    if rotary_size == shape[axis]:
        return halves
    return concatenate([halves, part(rotary_size, shape[axis])], axis)


def rotated_in_halves(fuse: Transform, rotary_size: int) -> Transform:
    """What ``fuse`` makes, [kv_heads, group + 2, D, ...], with ``half_split`` queries and keys."""

    def transform(sources: tuple[Source, ...], param: Param) -> Lazy:
        qkv = fuse(sources, param)
        others = (slice(None),) * (len(param.shape) - 2)
        value = param.shape[1] - 1
        queries_keys = qkv[(slice(None), slice(0, value), *others)]
        values = qkv[(slice(None), slice(value, value + 1), *others)]
        return concatenate([half_split(queries_keys, 2, rotary_size), values], 1)

    return transform


@dataclass(frozen=True)
class Rule:
    """How one weight is made.

    Attributes:
        target: a path of ``decoder.declare``; ``{i}`` stands for the layer's number.
        sources: names of tensors without the layout's prefix; ``{i}`` likewise. If they hold
            ``{e}``, they are taken for each of the target's experts, its first axis.
        transform: from the sources to an array of the weight's shape.
    """

    target: str
    sources: tuple[str, ...]
    transform: Transform = same

    def names(self, layer: str, target: Param) -> list[str]:
        """The names of its sources for one layer."""
        every = range(target.shape[0] if "{e}" in self.sources[0] else 1)
        return [name.format(i=layer, e=e) for e in every for name in self.sources]


@dataclass(frozen=True)
class Layout:
    """The rules of a family.

    Attributes:
        rules: at least one per weight that the family can have; of several, the first whose
            sources are all there applies.
        prefixes: a tensor's name may begin with one of these; it is cut off before rules apply.
        dropped: patterns (fnmatch) of tensors that nobody needs.
        dropped_if_tied: more of them for models whose logits reuse the embedding.
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    dropped_if_tied: tuple[str, ...] = ()

    def with_rules(self, *rules: Rule) -> Layout:
        """The layout with these rules instead of those for the same weights."""
        targets = {rule.target for rule in rules}
        others = tuple(rule for rule in self.rules if rule.target not in targets)
        return dataclasses.replace(self, rules=others + rules)


def plan(
    layout: Layout, tensors: Mapping[str, Lazy], config: ModelConfig, tree: Mapping[str, Param]
) -> dict[str, Lazy]:
    """How to make each weight of ``tree`` (as declared for ``config``) from the tensors.

    Raises:
        CheckpointError: a tensor is missing, not used, of the wrong shape, or not of floats.
    """
    sources = _without_prefixes(layout, tensors)
    rules: dict[str, list[Rule]] = {}
    for rule in layout.rules:
        rules.setdefault(rule.target, []).append(rule)
    wanted: dict[str, tuple[Transform, list[str]]] = {}
    for path in tree:
        match = re.fullmatch(r"layers/(\d+)/(.+)", path)
        number = match[1] if match else ""
        ways = [
            (rule.transform, rule.names(number, tree[path]))
            for rule in rules.get(f"layers/{{i}}/{match[2]}" if match else path, ())
        ]
        if not ways:
            raise CheckpointError(f"the family of {config.architecture} has no rule for {path!r}.")
        wanted[path] = next((way for way in ways if sources.keys() >= set(way[1])), ways[0])
    _check_names(layout, config, sources, {name for _, names in wanted.values() for name in names})
    return {
        path: _make(transform, tuple(sources[name] for name in names), tree[path])
        for path, (transform, names) in wanted.items()
    }


def _make(transform: Transform, sources: tuple[Source, ...], param: Param) -> Lazy:
    try:
        return transform(sources, param)
    except CheckpointError:
        raise
    except ValueError as error:  # for example parts of different dtypes
        names = preview([source.name for source in sources])
        raise CheckpointError(f"tensors {names} can't be combined: {error}") from None


def _without_prefixes(layout: Layout, tensors: Mapping[str, Lazy]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for full, array in tensors.items():
        prefix = next((p for p in layout.prefixes if full.startswith(p)), "")
        name = full[len(prefix) :]
        if name in sources:
            raise CheckpointError(
                f"tensors {sources[name].name!r} and {full!r} mean the same weight; remove one."
            )
        sources[name] = Source(full, array)
    return sources


def _check_names(
    layout: Layout, config: ModelConfig, sources: dict[str, Source], wanted: set[str]
) -> None:
    """Drops what the layout drops, and compares the names that are there with those needed."""
    patterns = layout.dropped + (layout.dropped_if_tied if config.tie_word_embeddings else ())
    for name in _matching(sources, patterns):
        del sources[name]
    missing = sorted(wanted - sources.keys())
    surplus = sorted(sources[name].name for name in sources.keys() - wanted)
    if missing:
        hint = f" It has {preview(surplus)}, which nothing uses." if surplus else ""
        raise CheckpointError(
            f"{len(missing)} tensors are missing: {preview(missing)}.{hint} The download is "
            f"incomplete, or the weights aren't those of a {config.architecture}."
        )
    if surplus:
        raise CheckpointError(
            f"{len(surplus)} tensors fit no weight of {config.architecture} as config.json "
            f"describes it: {preview(surplus)}. Check that config.json belongs to these weights; "
            "if they are to be ignored, add them to the family's dropped patterns."
        )


def _matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def repeat_kv_heads(array: Lazy, declared: Param, target: Param) -> Lazy:
    """Adapts a weight to a target with more KV heads, see ``decoder.for_tensor_parallel``.

    Key and value heads are repeated, each several times in a row, and the query heads of a group
    are shared out among the copies.
    """
    if declared.shape == target.shape:
        return array
    if declared.axes[0] != "kv_heads":  # the output projection: only the grouping changes
        return array.reshape(*target.shape)
    times = target.shape[0] // declared.shape[0]
    # A group of g queries shrinks to g / times, and what else axis 1 holds (keys, values) stays.
    queries = (declared.shape[1] - target.shape[1]) * times // (times - 1)
    everything = [slice(None)] * len(declared.shape)

    def part(start: int, stop: int) -> Lazy:
        index = list(everything)
        index[1] = slice(start, stop)
        return array[tuple(index)]

    q = part(0, queries).reshape(target.shape[0], queries // times, *target.shape[2:])
    rest = part(queries, declared.shape[1]).repeat(times, 0)
    return concatenate([q, rest], 1)
