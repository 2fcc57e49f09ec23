"""How many pages there are, in numbers, and that the whole stays below what may be used."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import DeviceFacts, EngineConfig, ResolvedConfig
from jaxserve.distributed import LOGICAL_TO_MESH, make_mesh
from jaxserve.engine import memory
from jaxserve.engine.memory import (
    FRACTIONS,
    GIB,
    UNSPLIT,
    MemoryPlan,
    activation_bytes,
    check_fits,
    claim_memory,
    plan_memory,
)
from jaxserve.errors import ConfigError
from jaxserve.model import decoder, kv_cache
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RouterSpec,
)
from jaxserve.model.params import num_bytes, partition_specs, sharded

NORM = NormSpec("rms", 1e-5)
LAYER = LayerSpec(AttentionSpec(8, 4, 16, 0.25), MLPSpec(256, "silu"), NORM)
MODEL = ModelConfig("Test", 1000, 128, 512, (LAYER,) * 3, NORM, False, 128)
PAGE_BYTES = 3 * 2 * 4 * 16 * 16 * 2  # layers, K and V, heads, head size, slots, bfloat16
WEIGHT_BYTES = num_bytes(decoder.declare(MODEL), jnp.bfloat16)
EMBEDDING_BYTES = 1000 * 128 * 2  # the largest weight


def resolved(**settings: Any) -> ResolvedConfig:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    return EngineConfig(**sizes | settings).resolve(DeviceFacts("cpu", 8), 512)


def pages(fraction: float = 0.9, model: ModelConfig = MODEL, **settings: Any) -> MemoryPlan:
    config, dtype = resolved(**settings), jnp.dtype("bfloat16")
    mesh = make_mesh(config.tensor_parallel_size)
    tree = decoder.declare(model)
    specs = partition_specs(tree, LOGICAL_TO_MESH, mesh.shape)
    weights = sharded(tree, dtype, mesh, specs)
    return plan_memory(config, model, weights, mesh, dtype, fraction)


@dataclasses.dataclass
class FakeDevice:
    """A device that tells its memory; ``pool`` is what its allocator has already."""

    limit: int
    in_use: int = 0
    pool: int = 0

    def memory_stats(self) -> dict[str, int]:
        return {
            "bytes_limit": self.limit,
            "bytes_in_use": self.in_use,
            "pool_bytes": self.pool,
        }


def on(patch: pytest.MonkeyPatch, *devices: FakeDevice) -> None:
    """Lets meshes consist of fake devices, as far as their memory is concerned, of which JAX takes
    its share at once, as it does if it isn't told otherwise."""
    patch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    patch.setattr(jax.sharding.Mesh, "local_devices", property(lambda mesh: list(devices)))


# --- the size of the cache ------------------------------------------------------------------------


def test_a_number_of_pages_comes_with_the_paddings_page_on_top() -> None:
    plan = pages(num_gpu_blocks_override=40)
    assert (plan.num_pages, plan.page_bytes) == (41, PAGE_BYTES)


def test_bytes_for_the_cache_hold_the_paddings_page_too() -> None:
    plan = pages(kv_cache_memory_bytes=100 * PAGE_BYTES + 5)
    assert plan.num_pages == 100
    assert pages(kv_cache_memory_bytes=1).num_pages == 1


def test_devices_share_a_page_and_the_weights() -> None:
    plan = pages(tensor_parallel_size=4, kv_cache_memory_bytes=100 * PAGE_BYTES)
    assert (plan.page_bytes, plan.num_pages) == (PAGE_BYTES // 4, 400)
    # All matrices are split; the norms are on every device.
    norms = (2 * 3 + 1) * 128 * 2
    assert plan.weights == norms + (WEIGHT_BYTES - norms) // 4


def test_a_cpu_takes_no_more_than_all_rows_could_use() -> None:
    plan = pages()
    assert plan.num_pages == 4 * 512 // 16
    assert (plan.weights, plan.slack) == (WEIGHT_BYTES, 0)


def test_a_cpu_leaves_room_for_the_weights_that_are_still_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Host:
        available, total = WEIGHT_BYTES + 20 * PAGE_BYTES, GIB

    monkeypatch.setattr(memory.psutil, "virtual_memory", Host)
    assert pages().num_pages == 10


# --- on a device that tells its memory ------------------------------------------------------------


def test_a_gpu_takes_what_is_left_beside_weights_that_are_not_there_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(monkeypatch, FakeDevice(8 * GIB, 3 * GIB))
    plan = pages()
    assert (plan.limit, plan.in_use, plan.weights) == (8 * GIB, 3 * GIB, WEIGHT_BYTES)
    assert plan.limit - PAGE_BYTES < plan.total <= plan.limit
    text = str(plan)
    assert "in use before 3.00 GiB, weights 0.00 GiB, activations 0.25 GiB, slack 0.13 GiB" in text
    assert f"KV cache ({plan.num_pages} pages) 4.62 GiB of 8.00 GiB" in text


def test_what_other_processes_hold_is_not_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, FakeDevice(8 * GIB, pool=3 * GIB))
    plan = pages()
    assert (plan.limit, plan.held) == (3 * GIB, 5 * GIB)
    assert plan.limit - PAGE_BYTES < plan.total <= plan.limit
    assert str(plan).endswith(" of 3.00 GiB (5.00 GiB more are held by others)")


@pytest.mark.parametrize(("pool", "grows"), [(8 * GIB, ""), (0, ""), (GIB, "false")])
def test_nobody_else_holds_anything(monkeypatch: pytest.MonkeyPatch, pool: int, grows: str) -> None:
    on(monkeypatch, FakeDevice(8 * GIB, pool=pool))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", grows)
    plan = pages()
    assert (plan.limit, plan.held) == (8 * GIB, 0)
    assert "others" not in str(plan)


def test_a_gpu_that_is_full_has_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, FakeDevice(GIB, GIB))
    assert pages().num_pages == 1


def test_the_fullest_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, FakeDevice(8 * GIB), FakeDevice(9 * GIB, 5 * GIB), FakeDevice(6 * GIB, GIB))
    plan = pages(tensor_parallel_size=2)
    assert (plan.limit, plan.in_use) == (9 * GIB, 5 * GIB)


@pytest.mark.parametrize(
    ("fraction", "utilization", "share"),
    [
        (0.9, 0.9, 1.0),  # JAX was given what this engine may use
        (0.9, 0.45, 0.5),  # ... more than that, for an engine before
        (0.5, 0.9, 1.0),  # ... less: more than JAX has can't be used
    ],
)
def test_utilization_is_of_the_devices_memory_and_never_exceeded(
    fraction: float, utilization: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 80 * GIB
    limit = int(fraction * total)
    on(monkeypatch, FakeDevice(limit))
    plan = pages(fraction, gpu_memory_utilization=utilization)
    assert plan.limit == int(limit * share)
    assert plan.limit - PAGE_BYTES < plan.total <= plan.limit <= utilization * total


SIZES = st.tuples(
    st.integers(1, 40),  # layers
    st.sampled_from([1, 3, 4]),  # KV heads
    st.sampled_from([8, 24, 64]),  # head size
    st.integers(GIB // 2, 16 * GIB),  # limit
    st.floats(0.01, 1),  # utilization
    st.sampled_from([8, 16, 128]),  # page size
)


def planned(
    sizes: tuple[int, int, int, int, float, int], **variables: str
) -> tuple[MemoryPlan, list[int], list[int]]:
    """The plan for one of ``SIZES``, and the bytes of each weight and of each of the cache's
    arrays."""
    layers, kv_heads, head_size, limit, utilization, page_size = sizes
    spec = AttentionSpec(kv_heads, kv_heads, head_size, 0.25)
    layer = dataclasses.replace(LAYER, attention=spec)
    model = dataclasses.replace(MODEL, layers=(layer,) * layers)
    with pytest.MonkeyPatch.context() as patch:
        on(patch, FakeDevice(limit))
        for name, value in variables.items():
            patch.setenv(name, value)
        plan = pages(1.0, model, gpu_memory_utilization=utilization, block_size=page_size)
    assert plan.num_pages == 1 or plan.total <= plan.limit <= limit * utilization
    dtype = jnp.dtype("bfloat16")
    arrays = kv_cache.shapes(model, plan.num_pages, page_size, dtype, make_mesh(1))
    weights = [num_bytes({"": weight}, dtype) for weight in decoder.declare(model).values()]
    return plan, weights, [math.prod(array.shape) * 2 for array in jax.tree.leaves(arrays)]


@given(SIZES)
def test_the_caches_arrays_fit_into_what_the_allocator_has_left(
    sizes: tuple[int, int, int, int, float, int],
) -> None:
    """Weights come first, with a hole left between them by XLA's autotuner as large as the largest.
    Then each array of the cache is cut from the rest, rounded; the activations still fit, as one
    piece."""
    plan, _, arrays = planned(sizes)
    if plan.num_pages == 1:  # nothing fits, and check_fits says so
        return
    assert sum(arrays) == plan.cache
    free = plan.limit - plan.in_use - plan.weights - EMBEDDING_BYTES
    for array in arrays:
        taken = -(-array // 256) * 256
        if free - taken < UNSPLIT and free < 2 * taken:
            taken = free  # the allocator doesn't split a region of which so little would remain
        free -= taken
        assert free >= 0
    assert free >= plan.activations


class GrowingAllocator:
    """XLA's BFCAllocator without preallocation: regions, each at least twice as large as the last
    one, of which pieces are cut."""

    def __init__(self, limit: int) -> None:
        self.limit, self.next_region, self.free = limit, 2 * 2**20, []

    def allocate(self, size: int) -> None:
        size = -(-size // 256) * 256
        fitting = [left for left in self.free if left >= size]
        if fitting:
            left = min(fitting)
            self.free.remove(left)
        else:
            assert size <= self.limit, "out of memory"
            doubled = False
            while self.next_region < size:
                self.next_region, doubled = 2 * self.next_region, True
            left = min(self.next_region, self.limit)
            self.limit -= left
            self.next_region *= 1 if doubled else 2
        if left - size >= UNSPLIT or left >= 2 * size:
            self.free.append(left - size)


@pytest.mark.parametrize("flag", ["false", "False", "0"])
@given(SIZES)
def test_the_caches_arrays_fit_into_an_allocator_that_grows(
    flag: str, sizes: tuple[int, int, int, int, float, int]
) -> None:
    plan, weights, arrays = planned(sizes, XLA_PYTHON_CLIENT_PREALLOCATE=flag)
    if plan.num_pages == 1:  # nothing fits, and check_fits says so
        return
    allocator = GrowingAllocator(plan.limit)
    for size in [*weights, *arrays, plan.activations]:
        allocator.allocate(size)


# --- the share that JAX's allocator gets ----------------------------------------------------------


@pytest.fixture
def no_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FRACTIONS:
        monkeypatch.setenv(name, "")  # restores it, too


@pytest.mark.usefixtures("no_shares")
def test_the_first_engine_tells_jax_and_the_next_one_learns_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "backends_are_initialized", lambda: False)
    assert claim_memory(0.7) == 0.7
    assert memory.os.environ[FRACTIONS[0]] == "0.7"
    assert claim_memory(0.9) == 0.7


@pytest.mark.usefixtures("no_shares")
def test_jax_that_has_started_already_has_taken_its_own_share() -> None:
    jax.devices()
    assert claim_memory(0.2) == claim_memory(0.9) == 0.75
    assert not any(memory.os.environ[name] for name in FRACTIONS)


@pytest.mark.usefixtures("no_shares")
@pytest.mark.parametrize("name", FRACTIONS)
def test_a_share_that_the_user_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting both variables makes JAX refuse to start."""
    monkeypatch.setenv(name, "0.4")
    assert claim_memory(0.9) == 0.4
    assert [each for each in FRACTIONS if memory.os.environ[each]] == [name]
    monkeypatch.setenv(name, "much")
    with pytest.raises(ConfigError, match=f"{name}=much must be above 0, at most 1"):
        claim_memory(0.9)


# --- the largest step -----------------------------------------------------------------------------


def test_larger_steps_and_models_need_more_scratch_memory() -> None:
    base = activation_bytes(resolved(), MODEL, jnp.dtype("bfloat16"))
    assert base >= GIB // 4 + 7 * 4 * 1000 * 4 + 64 * 3 * 256 * 2
    more_tokens = activation_bytes(resolved(max_num_batched_tokens=128), MODEL, jnp.bfloat16)
    more_rows = activation_bytes(resolved(max_num_seqs=8), MODEL, jnp.bfloat16)
    wide = dataclasses.replace(MODEL, vocab_size=2000)
    assert min(more_tokens, more_rows) > base
    assert activation_bytes(resolved(), wide, jnp.bfloat16) > base
    assert activation_bytes(resolved(), MODEL, jnp.float32) > base
    assert activation_bytes(resolved(tensor_parallel_size=4), MODEL, jnp.bfloat16) < base


def test_experts_need_scratch_memory_for_each_pair_of_a_token_and_an_expert() -> None:
    def scratch(devices: int = 1, **changes: Any) -> int:
        moe = MoESpec(**{"num_experts": 6, "intermediate_size": 96} | changes)
        layers = (dataclasses.replace(LAYER, ffn=moe),)
        model = dataclasses.replace(MODEL, layers=layers)
        return activation_bytes(resolved(tensor_parallel_size=devices), model, jnp.bfloat16)

    two, four = RouterSpec(top_k=2), RouterSpec(top_k=4)
    step = 64 * 2  # tokens, bytes
    assert scratch(router=four) - scratch(router=two) == step * 2 * 3 * (96 + 128)
    shared = MLPSpec(40, "silu")
    assert scratch(router=two, shared=shared) - scratch(router=two) == step * 3 * 40
    attention = 3 * (8 + 2 * 4) * 16 * step
    # Two devices share out 6 experts, and each keeps all pairs; four split the experts' width.
    assert scratch(1, router=two) - scratch(2, router=two) == attention // 2
    width = step * 2 * 3 * (96 - 96 // 4)
    assert scratch(1, router=two) - scratch(4, router=two) == attention * 3 // 4 + width


# --- what must fit --------------------------------------------------------------------------------

PLAN = MemoryPlan(
    num_pages=33,
    page_bytes=GIB // 64,
    in_use=GIB,
    weights=GIB,
    activations=GIB,
    slack=GIB // 4,
    limit=4 * GIB,
)


def test_one_longest_sequence_must_fit() -> None:
    check_fits(PLAN, resolved(max_model_len=512))
    plan = dataclasses.replace(PLAN, num_pages=32)
    with pytest.raises(ConfigError) as error:
        check_fits(plan, resolved(max_model_len=512))
    text = str(error.value)
    assert "max_model_len=512 tokens needs 0.50 GiB" in text
    assert "room for 496 tokens" in text
    assert "Set max_model_len=496 or less" in text
    assert "(32 pages)" in text


def test_without_room_for_a_page_no_length_is_recommended() -> None:
    plan = dataclasses.replace(PLAN, num_pages=1, page_bytes=GIB)
    with pytest.raises(ConfigError) as error:
        check_fits(plan, resolved())
    assert "room for 0 tokens" in str(error.value)
    assert "max_model_len=0" not in str(error.value)


@pytest.mark.parametrize("num_pages", [32, 64])
def test_other_processes_are_a_remedy_where_they_hold_memory(num_pages: int) -> None:
    for held in (0, GIB):
        plan = dataclasses.replace(PLAN, num_pages=num_pages, held=held)
        with pytest.raises(ConfigError) as error:
            check_fits(plan, resolved(max_model_len=512))
        assert ("or end the processes that nvidia-smi names" in str(error.value)) == bool(held)


def test_a_cache_of_a_given_size_must_fit_beside_the_rest() -> None:
    check_fits(dataclasses.replace(PLAN, num_pages=48), resolved())
    with pytest.raises(ConfigError, match=r"0\.25 GiB more than there is to use: .*Lower kv_cache"):
        check_fits(dataclasses.replace(PLAN, num_pages=64), resolved())
