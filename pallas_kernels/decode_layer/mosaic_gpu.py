"""The op on Hopper GPUs, in Pallas with the Mosaic GPU backend: one persistent kernel.

For one token each weight is read once, and a product of its own is over before its loads have
ramped up: what counts is that the memory never waits. So each multiprocessor has one block for the
whole layer. Its producer, a warpgroup, lets the copy engine fetch pages and rows of the weights
into rings of shared memory, whatever the consumers wait for; they, two warpgroups with a ring each,
do the rest. Between two phases they wait until all blocks have stored their part of the vector that
the next phase needs. While that takes long, until experts are chosen, the memory brings tiles of
the last product, which wait in slots of their own.

Four rows of a weight are a tile, and four units' rows of gate and up are one. Each warp has a row,
or one of each, and multiplies what its threads load: no warp waits for another one, and no product
needs a second pass over its result.

What blocks exchange stands in arrays that are empty before and after: nobody else sees them change,
so for XLA they are constants like any other.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer import mosaic_gpu_attention as attention
from pallas_kernels.decode_layer import mosaic_gpu_exchange as exchange
from pallas_kernels.decode_layer import mosaic_gpu_products as products
from pallas_kernels.decode_layer import mosaic_gpu_ring as ring
from pallas_kernels.decode_layer.mosaic_gpu_shape import (
    CONSUMERS,
    HEAD_SIZES,
    KEYS,
    LINE,
    MAX_EXPERTS,
    ROWS,
    TILE,
    Attention,
    Plan,
    Product,
    Shape,
    max_splits,
    shared_memory,
)
from pallas_kernels.decode_layer.types import Experts, LayerWeights
from pallas_kernels.lowering import hopper_cores
from pallas_kernels.paged_attention import AttentionBatch
from pallas_kernels.paged_attention.triton_common import LOG2_E
from pallas_kernels.rope_kv_write.types import CosSin, HeadNorm

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # of each thread
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)


def decode_layer(
    x: jax.Array,
    qkv: jax.Array,
    cos_sin: CosSin | None,
    head_norm: HeadNorm | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    page_table: jax.Array,
    batch: AttentionBatch,
    weights: LayerWeights,
    *,
    scale: float,
    sliding_window: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ``api.decode_layer``; ``interpret`` runs the kernel on a CPU, slowly.

    Raises:
        NotImplementedError: the kernel can't run this case here.
    """
    _check_dtypes(x, k_pages, v_pages, head_norm, weights)
    if qkv.shape[0] > 1:
        qkv = qkv.sum(0, keepdims=True)
    shape = _shape(qkv, cos_sin, head_norm, k_pages, weights, scale, sliding_window, x, interpret)
    spec = shape.attention
    norms = weights.norm, weights.next_norm
    scales = None if head_norm is None else (head_norm.q_scale, head_norm.k_scale)
    inputs: dict[str, Any] = {
        "x": x[0],
        "qkv": qkv.reshape(-1, spec.size).astype(jnp.float32),
        "scale": norms[0].scale,
        "next_scale": norms[1].scale,
        **dict(zip(("cos", "sin"), (part[0] for part in cos_sin or ()))),
        **dict(zip(("q_scale", "k_scale"), scales or ())),
        "page": page,
        "slot": slot,
        "page_table": page_table,
        "kv_len": batch.kv_len,
        "row": batch.row,
        # One array: of two that are alike XLA makes one.
        "counters": jnp.zeros(shape.counters, jnp.int32),
        **({} if interpret else _exchanged(shape)),
        **{f"weight {i}": _lines(w) for i, w in enumerate(_matrices(weights))},
        "k_pages": jax.new_ref(k_pages, memory_space=plgpu.GMEM),
        "v_pages": jax.new_ref(v_pages, memory_space=plgpu.GMEM),
    }
    outputs = _outputs(shape)
    results = _call(shape, inputs, outputs)
    named = dict(zip(outputs, results, strict=True))
    pages = inputs["k_pages"][...], inputs["v_pages"][...]
    return named["new_x"][None], named["y"][None], *pages


def _call(shape: Shape, inputs: dict[str, Any], outputs: dict[str, Any]) -> Sequence[jax.Array]:
    mesh = plgpu.Mesh(
        grid=(shape.blocks,),
        grid_names=("block",),
        num_threads=shape.consumers + 1,
        thread_name="role",
        kernel_name="decode_layer",
    )

    def body(*refs: Any) -> None:
        named = dict(zip((*inputs, *outputs), refs, strict=True))
        weights = [named.pop(f"weight {i}") for i in range(len(shape.products))]
        start = 0
        for name, size in shape.exchanged.items():
            named[name] = named["vectors"].at[pl.ds(start, size)]
            start += size
        run = functools.partial(_kernel, shape, types.SimpleNamespace(weights=weights, **named))
        pl.run_scoped(run, collective_axes="role", **shared_memory(shape))

    kernel = pl.kernel(
        body,
        tuple(outputs.values()),
        mesh=mesh,
        compiler_params=COMPILER_PARAMS,
        interpret=shape.interpret or None,
    )
    return kernel(*inputs.values())


# --- what is specialised for ----------------------------------------------------------------------


def _check_dtypes(x: jax.Array, k_pages: jax.Array, v_pages: jax.Array, *others: Any) -> None:
    arrays = x, k_pages, v_pages, *jax.tree.leaves(others)
    if len({array.dtype for array in arrays}) > 1 or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError("the Mosaic GPU kernel takes either bfloat16 or float16")


def _shape(
    qkv: jax.Array,
    cos_sin: CosSin | None,
    head_norm: HeadNorm | None,
    k_pages: jax.Array,
    weights: LayerWeights,
    scale: float,
    window: int | None,
    x: jax.Array,
    interpret: Any,
) -> Shape:
    """What the kernel is specialised for.

    Raises:
        NotImplementedError: it isn't made for such a shape.
    """
    _, _, kv_heads, parts, size = qkv.shape
    page_size = k_pages.shape[2]
    spec = Attention(
        *(kv_heads, parts - 2, size, page_size, scale * LOG2_E, window, cos_sin is not None),
        eps=None if head_norm is None else head_norm.eps,
    )
    partly = cos_sin is not None and 2 * cos_sin[0].shape[1] != size
    if size not in HEAD_SIZES or partly:
        raise NotImplementedError(f"the Mosaic GPU kernel has no part for heads of {size}")
    if page_size * size > TILE or page_size * size % LINE or page_size % KEYS or page_size > LINE:
        raise NotImplementedError(f"the Mosaic GPU kernel has no part for pages of {page_size}")
    ffn = weights.ffn
    choice: tuple[int, bool, float] = (0, False, 1.0)
    if isinstance(ffn, Experts):
        choice = (ffn.top_k, ffn.normalize, ffn.scale)
        if ffn.router.shape[0] > MAX_EXPERTS:
            raise NotImplementedError(f"the Mosaic GPU kernel chooses of {MAX_EXPERTS} experts")
    # In the interpreter, where nobody can wait for other blocks, there are none.
    blocks, consumers = (1, 1) if interpret else (hopper_cores(), CONSUMERS)
    norms = weights.norm.eps, weights.next_norm.eps
    shape = Shape(x.dtype, spec, _cut(weights), norms, *choice, blocks, consumers, interpret)
    if shape.slots < 2:
        raise NotImplementedError(f"{shape.widest} inputs leave no memory for the weights")
    return shape


def _matrices(weights: LayerWeights) -> list[jax.Array]:
    """The products' weights [experts, parts, outputs, inputs]."""
    ffn = weights.ffn
    if isinstance(ffn, Experts):
        inner = [ffn.router[None, None], ffn.up, ffn.down[:, None]]
    else:
        inner = [ffn.up[None], ffn.down[None, None]]
    return [weights.out[None, None], *inner, weights.next[None, None]]


def _lines(matrix: jax.Array) -> jax.Array:
    return matrix.reshape(*matrix.shape[:3], -1, LINE)


def _cut(weights: LayerWeights) -> tuple[Product, ...]:
    """The products.

    Raises:
        NotImplementedError: one can't be cut into tiles.
    """
    ffn, cut = weights.ffn, list[Product]()
    for matrix in _matrices(weights):
        _, parts, outputs, inputs = matrix.shape
        if outputs % ROWS or inputs % LINE:
            raise NotImplementedError(
                f"the Mosaic GPU kernel cuts weights into {ROWS} x {LINE}, not {outputs} x {inputs}"
            )
        before = sum(product.units for product in cut)
        chosen = ffn.top_k if isinstance(ffn, Experts) and matrix.shape[0] > 1 else 0
        summed = bool(chosen) and parts == 1
        stack = 2 if summed and outputs % (2 * ROWS) == 0 else 1
        cut.append(Product(outputs, inputs, parts, before, chosen, summed, stack))
    return tuple(cut)


def _outputs(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """All that the kernel stores in device memory, by name, but for the pages."""
    own, wide = shape.dtype, jnp.float32
    hidden, last = shape.products[0].outputs, shape.products[-1].outputs
    sizes: dict[str, tuple[tuple[int, ...], Any]] = {
        "new_x": ((hidden,), own),
        "y": ((last,), wide),
    }
    outputs = {name: jax.ShapeDtypeStruct(*size) for name, size in sizes.items()}
    if shape.interpret:  # it stores in outputs only
        outputs |= jax.eval_shape(lambda: _exchanged(shape))
    return outputs


def _exchanged(shape: Shape) -> dict[str, jax.Array]:
    """What ``exchange`` is about: the results of attention's items, all vectors of the kernel's
    dtype, and the experts' logits. They are empty before and after, so they are constants for XLA,
    as the counters are; no two may be alike, since of those it makes one."""
    spec, wide = shape.attention, jnp.float32
    rows = spec.kv_heads * max_splits(spec, shape.workers), ROWS * spec.tiles
    arrays = {
        "marks": exchange.empty((*rows, 2), wide),
        "sums": exchange.empty((*rows, spec.size), wide),
        "vectors": exchange.empty((sum(shape.exchanged.values()),), shape.dtype),
    }
    if shape.top_k:
        arrays["logits"] = exchange.empty((shape.products[1].outputs,), wide)
    return arrays


# --- the kernel -----------------------------------------------------------------------------------


def _kernel(shape: Shape, refs: Any, **scratch: Any) -> None:
    block = types.SimpleNamespace(index=lax.axis_index("block"), **scratch)
    role = lax.axis_index("role")
    plan = Plan.of(shape.attention, shape.workers, refs.kv_len[0])
    tiles = products.tiles_before(shape, block, plan)

    @pl.when(role == shape.consumers)
    def _():
        _set_registers(shape, PRODUCER_REGISTERS, "decrease")
        attention.produce(shape, block, refs, plan)
        products.produce(shape, block, refs, tiles)
        # Not before the consumers are done with the barriers.
        for consumer, count in enumerate(tiles[-1]):
            ring.drain(shape, block, consumer, count)
        plgpu.barrier_wait(block.passed)
        exchanged = [refs.marks, refs.vectors, *([refs.logits] if shape.top_k else [])]
        exchange.restore(shape, refs.counters, exchanged, block.came)

    @pl.when(role < shape.consumers)
    def _():
        _set_registers(shape, CONSUMER_REGISTERS, "increase")
        exchange.touch(shape, [refs.sums, refs.marks, refs.vectors])
        attention.consume(shape, block, refs, plan, role)
        own = [products.pick(role, before) for before in tiles]
        products.multiply(shape, block, refs, role, own)


def _set_registers(shape: Shape, count: int, action: str) -> None:
    if not shape.interpret:
        plgpu.set_max_registers(count, action=action)  # type: ignore[arg-type]
