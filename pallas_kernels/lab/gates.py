"""What an implementation must pass before it is timed, tuned or used."""

from __future__ import annotations

import functools
import traceback
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lab.ops import Arguments, Candidate, Op, split_static

WORST_VECTOR = 4
"""A single vector of an output may be wrong by this many times the tolerance of the whole."""


@dataclass(frozen=True)
class Verdict:
    """What the gates say of an implementation and a case.

    Attributes:
        status: "passed", "failed", "unsupported" where it raises NotImplementedError, or "skipped"
            where the gates were not tried.
        gate: the gate that it failed.
        message: what is wrong, or why it isn't supported.
        error: largest relative error of an output; None if it was not reached.
    """

    status: Literal["passed", "failed", "unsupported", "skipped"]
    gate: str = ""
    message: str = ""
    error: float | None = None


class GateError(Exception):
    """An implementation failed a gate."""

    def __init__(self, gate: str, message: str) -> None:
        super().__init__(message)
        self.gate = gate


def check(op: Op, candidate: Candidate, case: Any, seed: int, interpret: bool) -> Verdict:
    """Runs the gates: it takes the op's arguments, and runs; outputs have the reference's shapes,
    dtypes and values though nobody's memory holds NaN; a second run gives the same bits; inputs
    stay as they were; and buffers given away don't change the result.

    Args:
        op, candidate, case: what to check.
        seed: of the inputs.
        interpret: runs Pallas kernels on a CPU.
    """
    lacks = candidate.lacks(op)
    if lacks:
        return Verdict("failed", "signature", f"{candidate.name} takes no {', '.join(lacks)}")
    arguments = op.poison(case, op.make(case, seed))
    try:
        return Verdict("passed", error=_pass_gates(op, candidate, case, arguments, interpret))
    except GateError as failure:
        return Verdict("failed", failure.gate, str(failure))
    except NotImplementedError as reason:
        return Verdict("unsupported", message=str(reason))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})"
        return Verdict("failed", "it runs", message)


def _pass_gates(
    op: Op, candidate: Candidate, case: Any, arguments: Arguments, interpret: bool
) -> float:
    """The largest relative error of an output. Raises GateError, and what the function raises."""
    arrays, static = split_static(arguments)
    function = functools.partial(candidate.bind(interpret), **static)
    before = copied(arrays)

    def call(arrays: Arguments) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(function(**arrays)))

    run = jax.jit(call)
    outputs = jax.block_until_ready(run(arrays))
    masks = op.specified(case, arguments) or (None,) * len(outputs)
    error = _compare(op, case, before, static, outputs, masks)
    again = run(arrays)
    _same(outputs, again, masks, "determinism", "a second run gives other bits")
    for (path, now), (_, then) in zip(
        *(jax.tree_util.tree_leaves_with_path(tree) for tree in (arrays, before)), strict=True
    ):
        if not _same_bits(now, then):
            name = jax.tree_util.keystr(path)
            raise GateError("inputs unchanged", f"the argument {name} was changed")
    if op.carried:
        given, kept = _given_away(op, arrays)
        in_place = jax.jit(lambda given, kept: call(given | kept), donate_argnums=0)
        outputs = jax.block_until_ready(in_place(copied(given), kept))
        _same(again, outputs, masks, "donation", "donated inputs change the result")
    return error


def _given_away(op: Op, arrays: Arguments) -> tuple[Arguments, Arguments]:
    given = {name: arrays[name] for name in op.carried}
    return given, {name: value for name, value in arrays.items() if name not in given}


def _compare(
    op: Op,
    case: Any,
    arrays: Arguments,
    static: Arguments,
    outputs: tuple[jax.Array, ...],
    masks: tuple[np.ndarray | None, ...],
) -> float:
    """Compares with the reference, computed in the widest floats that the device has."""
    reference = functools.partial(op.reference, **static)
    promised = functools.partial(op.promised, case)
    outputs = tuple(promised(output) for output in outputs)
    wanted = jax.tree.leaves(
        jax.eval_shape(lambda **a: jax.tree.map(promised, reference(**a)), **arrays)
    )
    found = [(array.shape, array.dtype) for array in outputs]
    if found != [(array.shape, array.dtype) for array in wanted]:
        raise GateError("shapes", f"outputs are {found}, not {wanted}")
    tolerance, errors = op.tolerance(case), []
    double = op.widens and jax.default_backend() != "tpu"
    with jax.enable_x64(double):
        if op.widens:
            wide = jnp.dtype("float64" if double else "float32")
            arrays, static = _widened(arrays, wide), _widened(static, wide)
            reference = functools.partial(op.reference, **static)
        expected = jax.tree.leaves(jax.jit(reference)(**arrays))
        expected = [promised(output) for output in expected]
        for index, (actual, right, mask) in enumerate(zip(outputs, expected, masks, strict=True)):
            if not jnp.issubdtype(actual.dtype, jnp.floating):
                raise NotImplementedError(f"outputs of {actual.dtype} can't be compared")
            owned = np.ones((1,) * actual.ndim, bool) if mask is None else mask
            owned = owned.reshape(owned.shape + (1,) * (actual.ndim - owned.ndim))
            errors.append(_error_of(index, actual, right, jnp.asarray(owned), tolerance))
    return max(errors)


def _error_of(
    index: int, actual: jax.Array, right: jax.Array, owned: jax.Array, tolerance: float
) -> float:
    """The relative error of one output; raises GateError where it is too large."""
    wild, strayed, error, vectors = _differences(actual, right, owned)
    if bool(wild.any()):
        message = f"output {index} at {_first(wild)} is NaN or infinite, or should be"
        raise GateError("finite", f"{message}; was padding read?")
    if bool(strayed.any()):
        raise GateError(
            "untouched", f"output {index} was written at {_first(strayed)}, outside its places"
        )
    worst = float(vectors.max())
    if not (float(error) <= tolerance and worst <= WORST_VECTOR * tolerance):
        where = _first(vectors == vectors.max())
        raise GateError(
            "values",
            f"output {index} has a relative error of {float(error):.2g} (tolerance {tolerance:g}); "
            f"{worst:.2g} in its worst vector, {where} (tolerance {WORST_VECTOR * tolerance:g})",
        )
    return float(error)


@jax.jit
def _differences(actual: jax.Array, right: jax.Array, owned: jax.Array) -> Any:
    """(NaN or infinite where the reference isn't, or isn't so; a number where it is NaN; relative
    error of all; relative errors of the vectors along the last axis)."""
    actual = actual.astype(right.dtype)
    finite = jnp.isfinite(right)
    wild = finite & ~jnp.isfinite(actual)
    wild |= owned & jnp.isinf(right) & (actual != right)
    strayed = owned & jnp.isnan(right) & ~jnp.isnan(actual)
    compared = owned & finite
    difference = jnp.where(compared, actual - right, 0)
    squares = jnp.sum(jnp.square(difference), -1)
    sizes = jnp.sum(jnp.square(jnp.where(compared, right, 0)), -1)
    # A vector of nearly nothing is measured by the others, not by itself.
    floor = 1e-6 * sizes.mean() + jnp.finfo(right.dtype).tiny
    error = jnp.sqrt(squares.sum() / (sizes.sum() + jnp.finfo(right.dtype).tiny))
    return wild, strayed, error, jnp.sqrt(squares / (sizes + floor))


def _first(mask: jax.Array) -> str:
    return str([int(i) for i in np.argwhere(np.asarray(mask))[0]])


def _same(
    one: tuple[jax.Array, ...],
    other: tuple[jax.Array, ...],
    masks: tuple[np.ndarray | None, ...],
    gate: str,
    message: str,
) -> None:
    for index, (a, b, mask) in enumerate(zip(one, other, masks, strict=True)):
        if not _same_bits(a, b, mask):
            raise GateError(gate, f"output {index}: {message}")


def _same_bits(a: jax.Array, b: jax.Array, mask: np.ndarray | None = None) -> bool:
    """Whether two arrays are alike to the bit, NaN included, where the mask is True."""
    if jnp.issubdtype(a.dtype, jnp.floating):
        unsigned = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[a.dtype.itemsize]
        a, b = (jax.lax.bitcast_convert_type(x, unsigned) for x in (a, b))
    differ = a != b
    if mask is not None:
        differ &= mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim))
    return not bool(differ.any())


def copied(arrays: Any) -> Any:
    """The same values in memory of their own."""
    return jax.tree.map(jnp.copy, arrays)


def _widened(arguments: Arguments, dtype: Any) -> Arguments:
    """The arguments with every float, and every dtype of floats, made wide."""

    def widen(value: Any) -> Any:
        kind = value if isinstance(value, np.dtype) else getattr(value, "dtype", None)
        if kind is None or not jnp.issubdtype(kind, jnp.floating):
            return value
        return jnp.dtype(dtype) if isinstance(value, np.dtype) else value.astype(dtype)

    return jax.tree.map(widen, arguments)
