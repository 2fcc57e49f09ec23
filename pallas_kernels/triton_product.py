"""The loop of a matrix product over tiles, for kernels in Pallas with the Triton backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt


def tile_products(
    x_ref: Any,
    row: jax.Array,
    exists: jax.Array,
    w_ref: Any,
    expert: Any,
    output: jax.Array,
    start: Any,
    steps: Any,
    inputs: int,
) -> list[jax.Array]:
    """Part of a product of gathered rows and a tile of a weight; inside a kernel.

    Args:
        x_ref: [T, K].
        row: int32 [rows], of x.
        exists: bool [rows]; the others count as zero and are not read.
        w_ref: [E, parts, N, K].
        expert: int32, of w.
        output: int32 [outputs], rows of w[expert, part]; those from N on give zero.
        start: the first column.
        steps: of the loop, of ``inputs`` columns each; where ``inputs`` divides K, they must end at
            K or before.
        inputs: columns per step.

    Returns:
        For each part the sums float32 [outputs, rows] over the columns of w[expert, part, output]
        times x[row].
    """
    _, parts, outputs, size = w_ref.shape
    rows, block = row.shape[0], output.shape[0]
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    even, all_outputs = size % inputs == 0, outputs % block == 0

    def spread(index: jax.Array) -> jax.Array:
        return jnp.broadcast_to(index[:, None], (index.shape[0], inputs))

    def step(i, sums):
        column = start + i * inputs + jnp.arange(inputs)

        def columns(count):
            return jnp.broadcast_to(column[None, :], (count, inputs))

        inside = True if even else columns(rows) < size
        x = plt.load(x_ref.at[spread(row), columns(rows)], mask=spread(exists) & inside, other=0)
        mask, other = None, None
        if not (even and all_outputs):
            mask, other = (spread(output) < outputs) & (columns(block) < size), 0
        totals = []
        for part, total in enumerate(sums):
            fixed = (jnp.full((block, inputs), which) for which in (expert, part))
            index = (*fixed, spread(output), columns(block))
            w = plt.load(w_ref.at[index], mask=mask, other=other)
            totals.append(total + plt.dot(w, x.T, precision=precision))
        return totals

    zeros = [jnp.zeros((block, rows), jnp.float32) for _ in range(parts)]
    return lax.fori_loop(0, steps, step, zeros)
