"""The choice of experts, by each warp for itself: four logits to a lane, and what is found by a
warp's own instructions needs no memory and no barrier."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer import mosaic_gpu_exchange as exchange
from pallas_kernels.decode_layer import mosaic_gpu_words as words
from pallas_kernels.decode_layer.mosaic_gpu_shape import MAX_EXPERTS, Shape
from pallas_kernels.decode_layer.mosaic_gpu_words import arith, int32, ir, llvm, memref
from pallas_kernels.paged_attention.triton_common import LOG2_E

LANES = 32
EACH = MAX_EXPERTS // LANES
SIGN = -(1 << 31)


def choose(shape: Shape, found: Any, experts: Any, shares: Any) -> None:
    """Brings the experts with the highest of the logits that were found, [experts], of equals the
    first ones, and their shares, to shared memory [top_k]. The logits are a vector of float32 that
    is exchanged."""
    count, top_k = found.shape[0], shape.top_k
    if shape.interpret:
        own = lax.bitcast_convert_type(found[...], jnp.float32)
        best, chosen = lax.top_k(own, top_k)
        weights = jnp.exp(best - best[0])
        everything = jnp.sum(jnp.exp(own - best[0]))
        experts[...] = chosen.astype(jnp.int32)
        total = jnp.sum(weights) if shape.normalize else everything
        shares[...] = weights / total * shape.scale
        return

    @plgpu.inline_mgpu(arg_types=(words.REF,) * 3)
    def choose(ctx, found, experts, shares):
        f32 = ir.F32Type.get()
        lane = words.thread_number(LANES)
        keys = _keys(found, count, lane)
        first = arith.muli(lane, int32(EACH))

        # A loop: code that runs once takes longer to be fetched than to run.
        @mgpu.fori(int32(top_k), (tuple(keys), int32(0), int32(0)))
        def chosen(nth, carry):
            keys, own_key, own_expert = carry
            best = _over_warp("max.u32", functools.reduce(arith.maxui, keys))
            places = [arith.addi(first, int32(j)) for j in range(EACH)]
            having = [
                arith.select(_equal(key, best), place, int32(MAX_EXPERTS))
                for key, place in zip(keys, places)
            ]
            expert = _over_warp("min.u32", functools.reduce(arith.minui, having))
            keys = tuple(
                arith.select(_equal(place, expert), int32(0), key)
                for key, place in zip(keys, places)
            )
            mine = _equal(lane, nth)
            own_key = arith.select(mine, best, own_key)
            return keys, own_key, arith.select(mine, expert, own_expert)

        _, key, expert = chosen.results
        greatest = _over_warp("max.u32", key)
        has = arith.cmpi(arith.CmpIPredicate.ult, lane, int32(top_k))
        zero = mgpu.c(0.0, f32)
        weight = arith.select(has, _weight(key, greatest), zero)
        total: ir.Value
        if shape.normalize:
            total = weight
        else:
            exponentials = [
                arith.select(_equal(key, int32(0)), zero, _weight(key, greatest)) for key in keys
            ]
            total = functools.reduce(arith.addf, exponentials)
        total = words.over_threads(arith.addf, total, (16, 8, 4, 2, 1))
        share = arith.mulf(arith.divf(weight, total), mgpu.c(shape.scale, f32))
        with mgpu.when(has):
            place = words.to_index(lane)
            memref.store(expert, experts, [place])
            memref.store(share, shares, [place])
        mgpu.utils.warp_barrier()

    choose(found, experts, shares)


def _keys(logits: ir.Value, count: int, lane: ir.Value) -> list[ir.Value]:
    """A lane's logits as unsigned numbers in the same order, or zeros if there are none."""
    first = arith.muli(lane, int32(EACH))
    start = arith.minui(first, int32(count - EACH))
    pointer = mgpu.utils.memref_ptr(
        mgpu.memref_slice(logits, (mgpu.ds(words.to_index(start), EACH),))
    )
    exists = arith.cmpi(arith.CmpIPredicate.ult, first, int32(count))
    keys: list[ir.Value] = []
    [found] = exchange.load_filled([(pointer, EACH)], halves=False)
    for bits in found:
        negative = arith.cmpi(arith.CmpIPredicate.slt, bits, int32(0))
        flipped = arith.select(negative, int32(-1), int32(SIGN))
        keys.append(arith.select(exists, arith.xori(bits, flipped), int32(0)))
    return keys


def _weight(key: ir.Value, greatest: ir.Value) -> ir.Value:
    """exp(logit - the greatest one) of their keys."""
    f32 = ir.F32Type.get()

    def logit(key: ir.Value) -> ir.Value:
        negative = arith.cmpi(arith.CmpIPredicate.sge, key, int32(0))
        flipped = arith.select(negative, int32(-1), int32(SIGN))
        return arith.bitcast(f32, arith.xori(key, flipped))

    difference = arith.subf(logit(key), logit(greatest))
    exponent = arith.mulf(difference, mgpu.c(LOG2_E, f32))
    return words.exp2(exponent)


def _over_warp(kind: str, x: ir.Value) -> ir.Value:
    code = f"redux.sync.{kind} $0, $1, 0xffffffff;"
    result: Any = llvm.inline_asm(x.type, [x], code, "=r,r", has_side_effects=True)
    return result


def _equal(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)
