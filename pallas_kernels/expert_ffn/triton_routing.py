"""Which pairs of a token and an expert each program of the Triton kernels works on.

Pair p is token p // top_k with its (p % top_k)-th expert. The pairs of an expert are its group;
those whose expert lies on another device are one more group, the last. A program takes a slot:

- One token: slots are its pairs.
- Few pairs: slots are pairs or groups, whichever are fewer, and a program finds its group's pairs
  by looking at all of them. The program of a group's first pair works for the whole group. So
  nothing is launched before the products.
- Many pairs: ``plan`` sorts them by group, in one kernel, and slots are tiles of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.arithmetic import power_of_two

MOST_COMPARED = 8192
"""Rows of a tile times pairs that a program may compare to find its pairs: 64 numbers a thread."""
BLOCK = 2048
"""Pairs that a program of ``plan`` looks at together."""


class Routing(NamedTuple):
    """What programs find their pairs in, as arrays or as a kernel's references.

    Attributes:
        alone: int32 [P], the experts of a step's only token, or None.
        experts: int32 [P], those of few pairs, or None.
        order: int32 [P], the pairs sorted by group, or None.
        starts: int32 [groups], where the groups begin in ``order``, or None.
    """

    alone: Any = None
    experts: Any = None
    order: Any = None
    starts: Any = None


class Work(NamedTuple):
    """What a program does.

    Attributes:
        group: int32, an expert, or their number for those elsewhere.
        works: bool, False for an idle program.
        tiles: int32, how many tiles of its group's pairs it takes; None for one.
        pairs: from a tile's number to its pairs, int32 [rows], and which of them there are, bool
            [rows]; the others have the number behind the last pair's.
    """

    group: Any
    works: Any
    tiles: Any
    pairs: Callable[[Any], tuple[jax.Array, jax.Array]]

    def for_each_tile(self, body: Callable[[Any], None]) -> None:
        """Calls ``body`` with the numbers of the tiles."""

        @pl.when(self.works)
        def _():
            if self.tiles is None:
                body(0)
            else:
                lax.fori_loop(0, self.tiles, lambda i, _: body(i), None)


def route(experts: jax.Array, count: int, rows: int, interpret: bool) -> tuple[Routing, int]:
    """How programs find their pairs, and the number of slots.

    Args:
        experts: int32 [T, top_k].
        count: experts on this device.
        rows: pairs in a tile.
    """
    pairs, tokens = experts.size, experts.shape[0]
    experts = experts.reshape(-1)
    if tokens == 1:
        return Routing(alone=experts), pairs
    if rows * pairs <= MOST_COMPARED:
        return Routing(experts=experts), min(pairs, count + 1)
    order, starts = plan(experts, count, interpret)
    # Each group may end in a partly filled tile.
    return Routing(order=order, starts=starts), min(pairs, pairs // rows + count + 1)


def find(routing: Routing, slot: Any, rows: int, count: int) -> Work:
    """The work of a slot; inside a kernel."""
    if routing.alone is not None:
        return _alone(routing.alone, slot, rows, count)
    if routing.experts is None:
        return _planned(routing, slot, rows)
    return _among_few(routing, slot, rows, count)


def _alone(experts_ref: Any, slot: Any, rows: int, count: int) -> Work:
    expert, row = experts_ref[slot], jnp.arange(rows)
    here = (expert >= 0) & (expert < count)
    pair = jnp.where(row == 0, slot, experts_ref.shape[0])
    return Work(jnp.where(here, expert, count), True, None, lambda _: (pair, row == 0))


def _among_few(routing: Routing, slot: Any, rows: int, count: int) -> Work:
    pairs = routing.experts.shape[0]
    index = jnp.arange(max(16, power_of_two(pairs)))
    groups = _groups(routing.experts, index, count)
    group = slot if pairs > count else jnp.max(jnp.where(index == slot, groups, -1))
    own = groups == group
    rank = jnp.cumsum(own.astype(jnp.int32))
    total = jnp.max(rank)
    works = total > 0
    if pairs <= count:
        works = jnp.min(jnp.where(own, index, pairs)) == slot

    def tile(i: Any) -> tuple[jax.Array, jax.Array]:
        wanted = i * rows + 1 + jnp.arange(rows)
        found = own[None, :] & (rank[None, :] == wanted[:, None])
        exists = wanted <= total
        return jnp.where(exists, jnp.sum(jnp.where(found, index[None, :], 0), 1), pairs), exists

    return Work(group, works, lax.div(total + rows - 1, rows), tile)


def _groups(experts_ref: Any, index: jax.Array, count: int) -> jax.Array:
    """The groups of pairs ``index``; -1 behind the last pair."""
    real = index < experts_ref.shape[0]
    expert = plt.load(experts_ref.at[index], mask=real, other=-1)
    here = (expert >= 0) & (expert < count)
    return jnp.where(real, jnp.where(here, expert, count), -1)


def _planned(routing: Routing, slot: Any, rows: int) -> Work:
    groups, pairs = routing.starts.shape[0], routing.order.shape[0]
    group = jnp.arange(max(16, power_of_two(groups)))

    def start_of(group: jax.Array) -> jax.Array:
        return plt.load(routing.starts.at[group], mask=group < groups, other=pairs)

    start, end = start_of(group), start_of(group + 1)
    tiles = lax.div(end - start + rows - 1, rows)
    mine = jnp.sum((jnp.cumsum(tiles) <= slot).astype(jnp.int32))
    before = jnp.sum(jnp.where(group < mine, tiles, 0))
    first = jnp.sum(jnp.where(group == mine, start, 0)) + (slot - before) * rows
    last = jnp.sum(jnp.where(group == mine, end, 0))

    def tile(_: Any) -> tuple[jax.Array, jax.Array]:
        place = first + jnp.arange(rows)
        exists = place < last
        return plt.load(routing.order.at[place], mask=exists, other=pairs), exists

    return Work(mine, mine < groups, None, tile)


def plan(experts: jax.Array, count: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Sorts pairs by group (a counting sort, a program for each group).

    Args:
        experts: int32 [P].
        count: experts on this device.

    Returns:
        ``order`` [P] and ``starts`` [count + 1] of ``Routing``.
    """
    pairs = experts.shape[0]
    kernel = functools.partial(_plan_kernel, count=count, block=min(BLOCK, power_of_two(pairs)))
    return pl.pallas_call(
        kernel,
        name="expert_plan",
        grid=(count + 1,),
        out_shape=(
            jax.ShapeDtypeStruct((pairs,), jnp.int32),
            jax.ShapeDtypeStruct((count + 1,), jnp.int32),
        ),
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
    )(experts)


def _plan_kernel(experts_ref, order_ref, starts_ref, *, count, block):
    group = pl.program_id(0)
    steps = pl.cdiv(experts_ref.shape[0], block)

    def load(i):
        index = i * block + jnp.arange(block)
        return index, _groups(experts_ref, index, count)

    def count_smaller(i, total):
        _, groups = load(i)
        return total + jnp.sum(((groups >= 0) & (groups < group)).astype(jnp.int32))

    def place(i, first):
        index, groups = load(i)
        own = groups == group
        rank = jnp.cumsum(own.astype(jnp.int32))
        at = jnp.where(own, first + rank - 1, experts_ref.shape[0])
        plt.store(order_ref.at[at], index, mask=own)
        return first + jnp.max(rank)

    start = lax.fori_loop(0, steps, count_smaller, jnp.int32(0))
    starts_ref[group] = start
    lax.fori_loop(0, steps, place, start)
