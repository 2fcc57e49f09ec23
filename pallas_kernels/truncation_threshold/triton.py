"""The op for NVIDIA GPUs, in Pallas with the Triton backend: the logits are read once.

Three kernels. The first reads all logits and leaves the maximum and the mass of each group of
neighbouring tokens. The second searches these maxima: k groups with a maximum of at least x hold k
tokens of at least x, so the k-th of the maxima bounds the k-th logit from below, and likewise for
the mass of top-p. Only groups whose maximum reaches the bound can hold a threshold; the second
kernel lists them, and the third searches the tokens of these few groups, which stay in the cache.
Of a flat distribution with a wide top-p, that is all of them.

Mass is exp(logit - maximum) here: a token's probability but for the constant that divides all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import tuning
from pallas_kernels.arithmetic import power_of_two
from pallas_kernels.lowering import can_lower_triton
from pallas_kernels.truncation_threshold.bits import from_ordered, to_ordered
from pallas_kernels.truncation_threshold.settings import asked

LOG2_E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)
GROUPS = 64
"""Groups that a program of the first kernel reads."""
BOUND_STEPS = 6
"""Steps of the search for the bound: a rough one lets a few more groups through."""


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
        group: neighbouring tokens that share a maximum and a mass; a power of two.
        warps: of a lane's program in the third kernel.
        unroll: tiles of 4 tokens a thread that the third kernel loads together.
        pivots: values that a step of a search tries; a power of two less one.
    """

    group: int = 64
    warps: int = 8
    unroll: int = 4
    pivots: int = 7


def truncation_threshold(
    logits: jax.Array,
    min_p: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``api.truncation_threshold``; ``interpret`` runs the kernels on a CPU, slowly."""
    if not interpret and not can_lower_triton():
        raise NotImplementedError("the Triton kernel needs a GPU")
    settings = (min_p, top_k, top_p)
    config = config or _chosen(logits, *settings)
    lanes, vocab = logits.shape
    groups = power_of_two(-(-vocab // config.group))
    share = min(groups, GROUPS)

    def call(kernel: Callable, name: str, grid: tuple, outputs: list, warps: int) -> Callable:
        return pl.pallas_call(
            functools.partial(kernel, vocab=vocab, config=config),
            name=f"truncation_threshold_{name}",
            grid=grid,
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
            interpret=interpret,
            compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        )

    by_group, by_lane = (lanes, groups), (lanes,)
    outputs: list[Any] = [(by_group, jnp.float32)] * 2
    grid = (groups // share, lanes)
    summaries = call(_summarize_kernel, "summarize", grid, outputs, 4)(logits, *settings)
    outputs = [(by_group, jnp.int32), (by_lane, jnp.int32)] + [(by_lane, jnp.float32)] * 3
    selected = call(_select_kernel, "select", by_lane, outputs, 8)(*summaries, *settings)
    outputs = [(by_lane, jnp.float32)]
    search = call(_search_kernel, "search", by_lane, outputs, config.warps)
    (thresholds,) = search(logits, *selected, *settings)
    return jnp.where(asked(*settings, vocab).any, thresholds, -jnp.inf)


def _summarize_kernel(logits_ref, *refs, vocab, config):
    min_p_ref, top_k_ref, top_p_ref, top_ref, mass_ref = refs
    lane, size = pl.program_id(1), config.group
    share = min(GROUPS, top_ref.shape[1])
    first = pl.program_id(0) * share

    @pl.when(asked(min_p_ref[lane], top_k_ref[lane], top_p_ref[lane], vocab).any)
    def _():
        group = first + jnp.arange(share)
        token = group[:, None] * size + jnp.arange(size)[None, :]
        lanes = jnp.full((share, size), lane)
        x = plt.load(logits_ref.at[lanes, token], mask=token < vocab, other=-jnp.inf)
        top = jnp.max(x, axis=1)
        # A group without a token that may be chosen must not give NaN.
        mass = jnp.sum(jnp.exp(x - jnp.maximum(top, LOWEST)[:, None]), axis=1)
        top_ref[lane, pl.ds(first, share)] = top
        mass_ref[lane, pl.ds(first, share)] = mass


def _select_kernel(top_ref, mass_ref, *refs, vocab, config):
    min_p_ref, top_k_ref, top_p_ref, ids_ref, count_ref, low_ref, high_ref, mass_of_all_ref = refs
    lane, groups = pl.program_id(0), top_ref.shape[1]
    min_p, top_k, top_p = min_p_ref[lane], top_k_ref[lane], top_p_ref[lane]
    on = asked(min_p, top_k, top_p, vocab)

    @pl.when(on.any)
    def _():
        top = top_ref[lane, :]
        high = jnp.maximum(jnp.max(top), LOWEST)
        weight = jnp.exp(top - high)
        mass_of_all = jnp.sum(weight * mass_ref[lane, :])

        amount = jnp.where(on.top_k, 1.0, weight)
        goal = jnp.where(on.top_k, top_k.astype(jnp.float32), top_p * mass_of_all)

        def measure(pivots, low, high):
            amounts = [jnp.sum(jnp.where(top >= pivot, amount, 0.0)) for pivot in pivots]
            smallest = jnp.min(jnp.where(top >= low, top, jnp.inf))
            return amounts, smallest, jnp.max(jnp.where(top <= high, top, -jnp.inf))

        # The mass of a min-p's survivors isn't known yet, so it bounds by itself.
        bounded = on.top_k | (on.top_p & ~on.min_p)
        bound = _search(measure, LOWEST, high, lambda _: goal, config.pivots, BOUND_STEPS)
        low = jnp.maximum(jnp.where(bounded, bound, LOWEST), high + jnp.log(min_p))

        chosen = (top >= low).astype(jnp.int32)
        count, rank = jnp.sum(chosen), jnp.cumsum(chosen)
        group = jnp.arange(groups)
        place = jnp.where(chosen == 1, rank - 1, count + group - rank)  # the others come last
        plt.store(ids_ref.at[jnp.full((groups,), lane), place], group)
        count_ref[lane] = count
        low_ref[lane] = low
        high_ref[lane] = high
        mass_of_all_ref[lane] = mass_of_all


def _search_kernel(
    logits_ref, ids_ref, count_ref, low_ref, high_ref, mass_of_all_ref, *refs, vocab, config
):
    min_p_ref, top_k_ref, top_p_ref, threshold_ref = refs
    lane, size = pl.program_id(0), config.group
    rows = max(1, config.warps * 32 * 4 // size)
    min_p, top_k, top_p = min_p_ref[lane], top_k_ref[lane], top_p_ref[lane]
    on = asked(min_p, top_k, top_p, vocab)

    @pl.when(on.any)
    def _():
        count, lowest, top = count_ref[lane], low_ref[lane], high_ref[lane]
        lanes = jnp.full((rows, size), lane)

        def load(step):
            tiles = []
            for tile in range(config.unroll):
                row = (step * config.unroll + tile) * rows + jnp.arange(rows)
                index = jnp.full((rows,), lane), row
                group = plt.load(ids_ref.at[index], mask=row < count, other=0)
                token = group[:, None] * size + jnp.arange(size)[None, :]
                mask = (row < count)[:, None] & (token < vocab)
                tiles.append(plt.load(logits_ref.at[lanes, token], mask=mask, other=-jnp.inf))
            return tiles

        def measure(pivots, low, high, by_mass, count):
            def step(i, carry):
                amounts, smallest, largest, tiles = carry
                ahead = load(i + 1)  # arrives while this step's tiles are summed
                for x in tiles:
                    amount = jnp.exp2((x - top) * LOG2_E) if by_mass else 1.0
                    amounts = [
                        total + jnp.where(x >= pivot, amount, 0.0)
                        for total, pivot in zip(amounts, pivots)
                    ]
                    smallest = jnp.minimum(smallest, jnp.where(x >= low, x, jnp.inf))
                    largest = jnp.maximum(largest, jnp.where(x <= high, x, -jnp.inf))
                return amounts, smallest, largest, ahead

            def full(value):
                return jnp.full((rows, size), value, jnp.float32)

            carry = [full(0.0) for _ in pivots], full(jnp.inf), full(-jnp.inf), load(0)
            steps = pl.cdiv(count, rows * config.unroll)
            amounts, smallest, largest, _ = lax.fori_loop(0, steps, step, carry)
            totals = [jnp.sum(amount.reshape(-1)) for amount in amounts]
            return totals, jnp.min(smallest.reshape(-1)), jnp.max(largest.reshape(-1))

        def narrow(low, wanted, goal, by_mass):
            """The threshold of one truncation, if it's wanted, among the tokens from ``low`` on."""
            measured = functools.partial(
                measure, by_mass=by_mass, count=jnp.where(wanted, count, 0)
            )
            return jnp.where(wanted, _search(measured, low, top, goal, config.pivots), low)

        def mass_goal(mass):
            whole = on.top_k | on.min_p
            of_all = jnp.where(whole, mass, mass_of_all_ref[lane])
            return jnp.minimum(top_p * of_all, mass)

        k = top_k.astype(jnp.float32)
        threshold = narrow(lowest, on.top_k, lambda n: jnp.minimum(k, n), False)
        threshold_ref[lane] = narrow(threshold, on.top_p, mass_goal, True)


def _search(measure, low, high, goal, pivots, max_steps=128):
    """The largest of a lane's values whose tokens, from it on, amount to a goal.

    A step tries several pivots between the bounds, and shrinks the bounds to the values that were
    found between them. Even spacing finds logits soonest; every fourth step spaces the pivots
    evenly over the floats' bits, which ends in reasonable time whatever the values are.

    Args:
        measure: (pivots, low, high) -> the amount from each pivot on, and the smallest and largest
            value from low to high.
        low, high: float32 bounds of the values.
        goal: from the amount of all values >= low to the goal.
        max_steps: ends the search early, with a lower bound of the result.

    Returns:
        float32; ``low`` if even all values don't amount to the goal.
    """
    (total,), smallest, largest = measure([low], low, high)
    goal = goal(total)
    reached = total >= goal
    bounds = to_ordered(smallest), to_ordered(largest)

    def unfinished(carry):
        i, a, b = carry
        return reached & (a < b) & (i < max_steps)

    def step(carry):
        i, a, b = carry
        keys = _pivots(a, b, i % 4 == 3, pivots)
        amounts, smallest, largest = measure(
            [from_ordered(key) for key in keys], from_ordered(a), from_ordered(b)
        )
        # What was found lies between the old bounds; the new ones may be closer still.
        new_a, new_b = to_ordered(smallest), to_ordered(largest)
        for key, amount in zip(keys, amounts):
            new_a = jnp.where(amount >= goal, jnp.maximum(new_a, key), new_a)
            new_b = jnp.where(amount >= goal, new_b, jnp.minimum(new_b, key - 1))
        return i + 1, new_a, new_b

    _, a, _ = lax.while_loop(unfinished, step, (jnp.int32(0), *bounds))
    return jnp.where(reached, from_ordered(a), low)


def _pivots(a, b, by_bits, count):
    """``count`` ordered keys from a + 1 to b, evenly spaced by value or by bits."""
    parts = count + 1
    low, high = from_ordered(a), from_ordered(b)
    shift = parts.bit_length() - 1
    stride = (b >> shift) - (a >> shift)  # of a divided range: b - a could overflow
    keys = []
    for i in range(1, parts):
        even = to_ordered(low * (1 - i / parts) + high * (i / parts))
        keys.append(jnp.clip(jnp.where(by_bits, a + i * stride, even), a + 1, b))
    return keys


# --- configurations -------------------------------------------------------------------------------


def candidates(logits: jax.Array, *settings: jax.Array, **named: jax.Array) -> Iterable[Config]:
    """Configurations worth timing for these arguments."""
    return itertools.starmap(Config, itertools.product((64,), (4, 8, 16), (2, 4), (3, 7)))


def tuning_key(logits: jax.Array, *settings: jax.Array, **named: jax.Array) -> str:
    """What a tuned configuration depends on."""
    return "x".join(str(power_of_two(size)) for size in logits.shape)


def _chosen(logits: jax.Array, *settings: jax.Array) -> Config:
    tuned = tuning.lookup("truncation_threshold", "triton", tuning_key(logits, *settings))
    return Config() if tuned is None else Config(**tuned)
