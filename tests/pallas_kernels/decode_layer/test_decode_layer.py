"""Every implementation against the formulas in float64 numpy, and how the kernel cuts its work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from 0.11 on

from pallas_kernels.add_rms_norm import RMSNorm
from pallas_kernels.decode_attention import cases as attention_cases
from pallas_kernels.decode_attention import reference as attention_reference
from pallas_kernels.decode_layer import Experts, decode_layer, mosaic_gpu, reference
from pallas_kernels.decode_layer.cases import (
    BENCHMARKS,
    CASES,
    Case,
    make,
    make_weights,
    poison,
    specified,
)
from pallas_kernels.decode_layer.mosaic_gpu_shape import ROWS, Attention, Plan, Product, max_splits
from tests.helpers.lowering import lowers_for

IDS = [case.name for case in CASES]
KERNEL_CASES = [case for case in CASES if case.dtype != "float32"]
KERNEL_IDS = [case.name for case in KERNEL_CASES]
INTERPRETED = ("plain", "2 of 12 experts", "first token")
LAYERS = [case for case in BENCHMARKS if "tokens" not in case.name and "head" not in case.name]
STATIC = ("scale", "sliding_window")


def oracle(x: Any, heads: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of float64 arrays, in float64; ``heads`` is attention's output."""

    def normalized(x: np.ndarray, norm: RMSNorm) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + norm.eps) * norm.scale

    def network(x: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        gate, value = x @ up[0].T, x @ up[1].T
        return (gate / (1 + np.exp(-gate)) * value) @ down.T

    def mixture(x: np.ndarray, ffn: Experts) -> np.ndarray:
        logits = (x @ ffn.router.T)[0]
        chosen = np.argsort(-logits)[: ffn.top_k]
        scores = np.exp(logits - logits.max())
        scores = scores / (scores[chosen] if ffn.normalize else scores).sum() * ffn.scale
        return sum(scores[e] * network(x, ffn.up[e], ffn.down[e]) for e in chosen)

    x = x + heads @ weights.out.T
    h, ffn = normalized(x, weights.norm), weights.ffn
    x = x + (mixture(h, ffn) if isinstance(ffn, Experts) else network(h, ffn.up, ffn.down))
    return x, normalized(x, weights.next_norm) @ weights.next.T


def expected(case: Case, arguments: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """The op's outputs; attention's reference has tests of its own."""
    own = {key: value for key, value in arguments.items() if key not in ("x", "weights")}
    own["norm"] = own.pop("head_norm")
    dtype = jnp.dtype(case.dtype)
    heads, k_pages, v_pages = attention_reference.decode_attention(**own, dtype=dtype)
    wide = jax.tree.map(
        lambda array: np.asarray(array, np.float64),
        (arguments["x"], heads.reshape(1, -1), arguments["weights"]),
    )
    pages = (np.asarray(pages, np.float64) for pages in (k_pages, v_pages))
    return *oracle(*wide), *pages


def check(function: Callable[..., Any], case: Case, seed: int) -> None:
    arguments = make(case, seed)
    tolerance = 1e-5 if case.dtype == "float32" else 1e-2
    # The interpreter's callbacks need the threads that would still be making the arguments.
    outputs = function(**jax.block_until_ready(poison(case, arguments)))
    wanted, places = expected(case, arguments), specified(case, arguments)
    assert [y.dtype for y in outputs[:2]] == [jnp.dtype(case.dtype), jnp.float32]
    for actual, right in zip(outputs[:2], wanted[:2], strict=True):
        error = np.linalg.norm(np.asarray(actual, np.float64) - right) / np.linalg.norm(right)
        assert error < tolerance
    # Of the pages, the new key and value; all others are as they were.
    place = arguments["page"], slice(None), arguments["slot"]
    before = poison(case, arguments)
    for name, pages, right in zip(("k_pages", "v_pages"), outputs[2:], wanted[2:], strict=True):
        new, fresh = np.asarray(pages[place], np.float64), right[tuple(map(_index, place))]
        assert np.linalg.norm(new - fresh) <= tolerance * np.linalg.norm(fresh)
        kept, old = (np.asarray(p.at[place].set(0), np.float64) for p in (pages, before[name]))
        np.testing.assert_array_equal(kept[places[2]], old[places[2]])


def _index(index: Any) -> Any:
    return index if isinstance(index, slice) else np.asarray(index)


def abstract(case: Case) -> dict[str, Any]:
    """The op's arguments, without the weights' contents."""
    arguments = attention_cases.make(case.attention, seed=0)
    del arguments["dtype"]
    arguments["head_norm"] = arguments.pop("norm")
    weights = jax.eval_shape(lambda: make_weights(case, seed=0))
    x = jax.ShapeDtypeStruct((1, case.hidden), case.dtype)
    return arguments | {"x": x, "weights": weights}


def lowered(arguments: dict[str, Any]) -> str:
    fixed = {name: arguments.pop(name) for name in STATIC}
    return lowers_for("cuda", functools.partial(mosaic_gpu.decode_layer, **fixed), **arguments)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_reference_follows_the_formulas(case: Case) -> None:
    check(reference.decode_layer, case, seed=1)


@pytest.mark.parametrize("name", INTERPRETED)
def test_mosaic_gpu_interpreted_follows_the_formulas(name: str) -> None:
    """One block with one consumer: the interpreter has nobody to wait for."""
    case = next(case for case in CASES if case.name == name)
    kernel = functools.partial(mosaic_gpu.decode_layer, interpret=InterpretGPUParams())
    check(jax.jit(kernel, static_argnames=STATIC), case, seed=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", KERNEL_CASES, ids=KERNEL_IDS)
def test_mosaic_gpu_on_the_gpu_follows_the_formulas(case: Case) -> None:
    check(jax.jit(mosaic_gpu.decode_layer, static_argnames=STATIC), case, seed=3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "2 of 12 experts", "many splits"])
def test_one_call_leaves_nothing_behind_for_the_next(name: str) -> None:
    arguments = make(next(case for case in CASES if case.name == name), seed=4)
    layer = jax.jit(mosaic_gpu.decode_layer, static_argnames=STATIC)
    first = layer(**arguments)
    for _ in range(100):
        again = layer(**arguments)
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.gpu
def test_results_that_are_no_numbers_are_no_reason_to_wait() -> None:
    """Vectors that blocks exchange hold a NaN where nothing was stored yet."""
    arguments = make(next(case for case in CASES if case.name == "2 of 12 experts"), seed=5)
    bits = np.full(arguments["x"].shape, 0xFFFF, np.uint16)
    arguments["x"] = jax.lax.bitcast_convert_type(jnp.asarray(bits), arguments["x"].dtype)
    x, y, *_ = jax.jit(mosaic_gpu.decode_layer, static_argnames=STATIC)(**arguments)
    assert np.isnan(np.asarray(x, np.float32)).all() and np.isnan(np.asarray(y)).all()


@pytest.mark.parametrize("case", [*KERNEL_CASES, *LAYERS], ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case) -> None:
    assert "decode_layer" in lowered(abstract(case))


def attention_case(widths: dict[str, Any], **settings: Any) -> Case:
    """The plain case with other widths, or another attention."""
    own = {"dtype": "bfloat16", "padding": 0} | settings
    return Case("changed", attention_cases.case("changed", (37,), **own), **widths)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (CASES[-2], "bfloat16 or float16"),
        (attention_case({"ffn": 72}), "cuts weights into 4 x 256"),
        (attention_case({}, heads=804), "51456 inputs leave no memory"),
        (attention_case({}, head_size=96, heads=8), "heads of 96"),
        (attention_case({}, rotary_size=32), "heads of 64"),
        (attention_case({}, page_size=4), "pages of 4"),
        (attention_case({"experts": 256, "top_k": 2}), "chooses of 128 experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_kernel_cannot_do_is_left_to_others(case: Case, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        lowered(abstract(case))


def test_norms_in_another_dtype_are_left_to_others() -> None:
    arguments = abstract(CASES[0])
    norm = RMSNorm(jnp.ones(CASES[0].hidden), 1e-5)
    weights = arguments["weights"]._replace(norm=norm)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        lowered(arguments | {"weights": weights})


@given(
    st.integers(1, 400),
    st.integers(0, 10**6),
    st.integers(1, 140),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([(0, False), (3, False), (3, True)]),
)
def test_blocks_and_consumers_share_out_all_units(
    units: int, before: int, blocks: int, consumers: int, experts: tuple[int, bool]
) -> None:
    product = Product(units * ROWS, 256, 1, before, *experts)
    done = []
    for block in range(blocks):
        first = int(product.first(block, blocks))
        count = int(product.share(block, blocks))
        shares = (product.share(block, blocks, n, consumers) for n in range(consumers))
        assert sum(map(int, shares)) == count
        done += [first + n * blocks for n in range(count)]
        # The turn goes on where the products before have left it.
        assert (first + before) % blocks == block
    assert sorted(done) == list(range(product.units))


@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from([(0, False), (3, False), (3, True)]))
def test_tiles_cover_each_matrix_once(groups: int, lines: int, experts: tuple[int, bool]) -> None:
    product = Product(groups * ROWS, lines * 256, 1, 0, *experts)
    tiles = [
        tuple(map(int, product.source(unit, chunk)))
        for unit in range(product.units)
        for chunk in range(product.chunks)
    ]
    rows, chunks = range(0, product.outputs, product.rows), product.inputs // product.chunk
    every = [(e, r, c) for e in range(max(1, experts[0])) for r in rows for c in range(chunks)]
    assert sorted(tiles) == every


@given(
    kv_len=st.integers(0, 5000),
    window=st.none() | st.integers(1, 3000),
    kv_heads=st.sampled_from([1, 2, 3, 8, 300]),
    workers=st.sampled_from([1, 2, 264]),
)
def test_items_cover_all_pages_that_are_seen(
    kv_len: int, window: int | None, kv_heads: int, workers: int
) -> None:
    spec = Attention(kv_heads, 2, 64, 16, 1.0, window, True, None)
    plan = Plan.of(spec, workers, kv_len)
    assert 1 <= plan.splits <= max_splits(spec, workers)
    covered = []
    for worker in range(workers):
        for i in range(int(plan.items(spec, workers, worker))):
            number = worker + i * workers
            head, split, first, pages = map(int, plan.item(spec, number))
            assert pages > 0 and number == split * kv_heads + head
            covered += [(head, page) for page in range(first, first + pages)]
    last = max(kv_len, 1) - 1
    start = 0 if window is None else max(0, last + 1 - window)
    pages = range(start // 16, last // 16 + 1)
    assert sorted(covered) == [(head, page) for head in range(kv_heads) for page in pages]


def test_arguments_that_do_not_fit_are_refused() -> None:
    arguments = make(CASES[0], seed=0)
    weights = arguments["weights"]
    narrow = jnp.zeros((8, 8), jnp.bfloat16)
    for wrong, reason in (
        ({"x": jnp.zeros((1, 8), jnp.bfloat16)}, "qkv .* don't fit"),
        ({"weights": weights._replace(next=narrow)}, "the next weight"),
        ({"weights": weights._replace(ffn=weights.ffn._replace(down=narrow))}, "up .* and down"),
    ):
        with pytest.raises(ValueError, match=reason):
            decode_layer(**arguments | wrong)
