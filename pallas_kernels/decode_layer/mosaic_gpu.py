"""The op on Hopper GPUs, in Pallas with the Mosaic GPU backend: one persistent kernel.

For one token each weight is read once, and a product of its own is over before its loads have
ramped up: what counts is that the memory never waits. So each multiprocessor has one block for the
whole layer. Its producer, a warpgroup, lets the copy engine fetch pages and rows of the weights
into rings of shared memory, whatever the consumers wait for; they, two warpgroups with a ring each,
do the rest. Between two phases they wait until all blocks have stored their part of the vector that
the next phase needs.

Four rows of a weight are a tile, and four units' rows of gate and up are one. Each warp has a row,
or one of each, and multiplies what its threads load: no warp waits for another one, and no product
needs a second pass over its result.

Blocks count their arrivals in an array that is zero before and after: nobody else sees it change,
so for XLA it is a constant like any other.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer import mosaic_gpu_attention as attention
from pallas_kernels.decode_layer import mosaic_gpu_choice as choice
from pallas_kernels.decode_layer import mosaic_gpu_dot as dot
from pallas_kernels.decode_layer import mosaic_gpu_exchange as exchange
from pallas_kernels.decode_layer import mosaic_gpu_ring as ring
from pallas_kernels.decode_layer.mosaic_gpu_shape import (
    CONSUMERS,
    HEAD_SIZES,
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
        "counters": jnp.zeros(shape.waits + 1 + spec.kv_heads, jnp.int32),
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
    if page_size * size > TILE or page_size * size % LINE or page_size % 8 or page_size > LINE:
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
    ffn, products = weights.ffn, list[Product]()
    for matrix in _matrices(weights):
        _, parts, outputs, inputs = matrix.shape
        if outputs % ROWS or inputs % LINE:
            raise NotImplementedError(
                f"the Mosaic GPU kernel cuts weights into {ROWS} x {LINE}, not {outputs} x {inputs}"
            )
        before = sum(product.units for product in products)
        chosen = ffn.top_k if isinstance(ffn, Experts) and matrix.shape[0] > 1 else 0
        summed = bool(chosen) and parts == 1
        stack = 2 if summed and outputs % (2 * ROWS) == 0 else 1
        products.append(Product(outputs, inputs, parts, before, chosen, summed, stack))
    return tuple(products)


def _outputs(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """All that the kernel stores in device memory, by name, but for the pages."""
    spec, products = shape.attention, shape.products
    items = spec.kv_heads * max_splits(spec, shape.workers)
    rows = ROWS * spec.tiles
    own, wide = shape.dtype, jnp.float32
    hidden, last = products[0].outputs, products[-1].outputs
    sizes: dict[str, tuple[tuple[int, ...], Any]] = {
        "tops": ((items, rows), wide),
        "totals": ((items, rows), wide),
        "sums": ((items, rows, spec.size), wide),
        "new_x": ((hidden,), own),
        "y": ((last,), wide),
    }
    outputs = {name: jax.ShapeDtypeStruct(*size) for name, size in sizes.items()}
    if shape.interpret:  # it stores in outputs only
        outputs |= jax.eval_shape(lambda: _exchanged(shape))
    return outputs


def _exchanged(shape: Shape) -> dict[str, jax.Array]:
    """What ``exchange`` is about: all vectors of the kernel's dtype, and the experts' logits. They
    are empty before and after, so they are constants for XLA, as the counters are."""
    arrays = {"vectors": exchange.empty(sum(shape.exchanged.values()), shape.dtype)}
    if shape.top_k:
        arrays["logits"] = exchange.empty(shape.products[1].outputs, jnp.float32)
    return arrays


# --- the kernel -----------------------------------------------------------------------------------


def _kernel(shape: Shape, refs: Any, **scratch: Any) -> None:
    block = types.SimpleNamespace(index=lax.axis_index("block"), **scratch)
    role = lax.axis_index("role")
    plan = Plan.of(shape.attention, shape.workers, refs.kv_len[0])
    tiles = _tiles_before(shape, block, plan)

    @pl.when(role == shape.consumers)
    def _():
        _set_registers(shape, PRODUCER_REGISTERS, "decrease")
        attention.produce(shape, block, refs, plan)
        _produce_all(shape, block, refs, tiles)
        # Not before the consumers are done with the barriers.
        for consumer, count in enumerate(tiles[-1]):
            ring.drain(shape, block, consumer, count)
        plgpu.barrier_wait(block.passed)
        exchanged = [refs.vectors, *([refs.logits] if shape.top_k else [])]
        exchange.restore(shape, refs.counters, exchanged, block.arrived.at[shape.consumers])

    @pl.when(role < shape.consumers)
    def _():
        _set_registers(shape, CONSUMER_REGISTERS, "increase")
        attention.consume(shape, block, refs, plan, role)
        _multiply_all(shape, block, refs, role, [_pick(role, before) for before in tiles])


def _set_registers(shape: Shape, count: int, action: str) -> None:
    if not shape.interpret:
        plgpu.set_max_registers(count, action=action)  # type: ignore[arg-type]


def _tiles_before(shape: Shape, block: Any, plan: Plan) -> list[list[Any]]:
    """For each product and behind the last one, how many tiles came before for each consumer, but
    for those that are held."""
    consumers = range(shape.consumers)
    tiles = [[attention.tiles(shape, block, plan, consumer) for consumer in consumers]]
    for product in shape.products:
        held = shape.held if product is shape.products[-1] else 0
        counts = (
            product.chunks * product.share(block.index, shape.blocks, consumer, shape.consumers)
            for consumer in consumers
        )
        own = [jnp.maximum(count - held, 0) if held else count for count in counts]
        tiles.append([sum_ + count for sum_, count in zip(tiles[-1], own)])
    return tiles


def _pick(index: Any, values: Sequence[Any]) -> Any:
    """``values[index]`` of an index that isn't known when the kernel is made."""
    picked = values[0]
    for number, value in enumerate(values[1:], 1):
        picked = jnp.where(index == number, value, picked)
    return picked


def _produce_all(shape: Shape, block: Any, refs: Any, tiles: list[list[Any]]) -> None:
    held, last = shape.held, len(shape.products) - 1
    for number, product in enumerate(shape.products):
        if product.chosen and not shape.products[number - 1].chosen:
            plgpu.barrier_wait(block.chosen)
        share = product.share(block.index, shape.blocks)
        stop = lax.div(share + shape.consumers - 1, shape.consumers) * product.chunks
        start = held if number == last else 0

        def in_turn(consumer: int, tile: Any, number: int = number, start: int = start) -> Any:
            return tiles[number][consumer] + tile - start

        _produce(shape, block, product, refs.weights[number], start, stop, in_turn)
        if number == 0 and held:
            product, weight = shape.products[-1], refs.weights[-1]
            _produce(shape, block, product, weight, 0, held, lambda _, tile: -1 - tile)


def _produce(
    shape: Shape,
    block: Any,
    product: Product,
    weight: Any,
    start: int,
    stop: Any,
    number_of: Callable,
) -> None:
    """Fetches the block's tiles of a weight [experts, parts, outputs, lines, LINE]: of each
    consumer's those from ``start`` to ``stop``, whose numbers in the rings are
    ``number_of(consumer, tile)``."""
    lines = product.chunk // LINE
    share = product.share(block.index, shape.blocks)

    def fetch(i, carry):
        turn, chunk = lax.div(i, product.chunks), lax.rem(i, product.chunks)
        # One tile for each consumer: none shall wait until another one's ring has room.
        for consumer in range(shape.consumers):
            nth = turn * shape.consumers + consumer

            @pl.when(nth < share)
            def _(consumer: int = consumer, nth: Any = nth) -> None:
                unit = product.first(block.index, shape.blocks) + nth * shape.blocks
                which, row, own = product.source(unit, chunk)
                expert = block.experts[0, which] if product.chosen else 0
                rows, columns = pl.ds(row, product.rows), pl.ds(own * lines, lines)
                source = weight.at[expert, :, rows, columns]
                ring.fetch(shape, block, product, consumer, number_of(consumer, i), source)

    lax.fori_loop(start, stop, fetch, None)


def _multiply_all(shape: Shape, block: Any, refs: Any, role: Any, tiles: list[Any]) -> None:
    """The products, and what is between them."""
    last = len(shape.products) - 1

    def bring(number: int, *vector: Any) -> None:
        """Waits for the signals of a number, and brings the vector that they are about."""
        count = shape.workers if number else shape.attention.kv_heads
        exchange.wait(shape, refs.counters, number, count)
        exchange.bring(shape, block.vector.at[role], block.scratch.at[role], *vector)

    def choose() -> None:
        exchange.wait(shape, refs.counters, 2, shape.workers)
        choice.choose(shape, refs.logits, block.experts.at[role], block.shares.at[role])
        plgpu.barrier_arrive(block.chosen)

    def bring_stream() -> None:
        bring(last, refs.stream, refs.next_scale, shape.eps[1])
        plgpu.barrier_arrive(block.passed)

    def gate(unit, _, gate, up):
        return up * gate / (1 + jnp.exp(-gate))

    def weighed_gate(unit, _, *parts):
        which, _, _ = shape.products[2].source(unit, 0)
        return gate(unit, None, *parts) * block.shares[role, which]

    def only(unit, _, sum_):
        return sum_

    def add(unit, old, sum_):
        return old.astype(jnp.float32) + sum_

    def multiply(which: int, ready: Callable, outs: Sequence, finish: Callable, old: Any = None):
        product = shape.products[which]
        _consume(shape, block, role, product, tiles[which], ready, outs, finish, old)
        if which < last:
            exchange.signal(shape, refs.counters, which + 1)

    bring_h = functools.partial(bring, 1, refs.h, refs.scale, shape.eps[0])
    multiply(0, lambda: bring(0, refs.attended), [refs.h], add, refs.x)
    if shape.top_k:
        multiply(1, bring_h, [refs.logits], only)
        multiply(2, choose, [refs.gated], weighed_gate)
    else:
        multiply(1, bring_h, [refs.gated], gate)
    streams = [refs.stream, refs.new_x]
    multiply(last - 1, lambda: bring(last - 1, refs.gated), streams, add, refs.h)
    multiply(last, bring_stream, [refs.y], only)


def _consume(
    shape: Shape,
    block: Any,
    role: Any,
    product: Product,
    before: Any,
    ready: Callable,
    outs: Sequence[Any],
    finish: Callable,
    old: Any,
) -> None:
    """Multiplies the consumer's units of a product, when ``ready`` has brought the inputs, and
    stores ``finish(unit, old, *sums)`` of each four rows, with what stands there in ``old``."""
    vector, parts, stack = block.vector.at[role], product.parts, product.stack
    held = shape.held if product is shape.products[-1] else 0
    count = product.share(block.index, shape.blocks, role, shape.consumers)

    def unit_of(i: Any) -> Any:
        nth = i * shape.consumers + role
        return product.first(block.index, shape.blocks) + nth * shape.blocks

    def rows_of(unit: Any) -> list[Any]:
        return [pl.ds(unit * product.rows + ROWS * n, ROWS) for n in range(stack)]

    def load(i: Any) -> list[jax.Array]:
        """What stands in ``old``, also of no unit."""
        if old is None:
            return []
        unit = jnp.minimum(unit_of(i), product.units - 1)
        return [exchange.rows_of(shape, old, own) for own in rows_of(unit)]

    def unit(i, olds):
        following, unit = load(i + 1), unit_of(i)  # loaded early, lest anything waits for them

        def add(chunk, sums):
            number = i * product.chunks + chunk
            after = before + number - held
            number = jnp.where(number < held, -1 - number, after) if held else after
            inputs = vector.at[pl.ds(chunk * product.chunk, product.chunk)]
            tile = ring.receive(shape, block, product, role, number)
            pieces = [
                tile.at[part, pl.ds(ROWS * n, ROWS)] for n in range(stack) for part in range(parts)
            ]
            sums = tuple(dot.dot(shape, own, inputs, sum_) for own, sum_ in zip(pieces, sums))
            ring.release(shape, block, product, role, number)
            return sums

        none = (dot.no_sums(shape),) * (parts * stack)
        sums = lax.fori_loop(0, product.chunks, add, none)
        totals = [dot.total(shape, sum_) for sum_ in sums]
        for n, own in enumerate(rows_of(unit)):
            done = finish(unit, olds[n] if olds else None, *totals[n * parts : (n + 1) * parts])
            for out in outs:
                exchange.put(shape, out, own, done)
        return following

    first = load(0)
    ready()
    lax.fori_loop(0, count, unit, first)
