"""A mixture of experts: what comes out, and that devices share the work."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.distributed import LOGICAL_TO_MESH, make_mesh
from jaxserve.model import moe
from jaxserve.model.config import MLPSpec, MoESpec, RouterSpec
from jaxserve.model.params import Params, partition_specs
from pallas_kernels.dispatch import Kernels
from tests.helpers.routing import route, sigmoid

HIDDEN = 18
TOKENS = 11
MIXTRAL = MoESpec(8, 12, RouterSpec(2, normalize=True))
QWEN = dataclasses.replace(MIXTRAL, shared=MLPSpec(20, "silu"), shared_gate=True)
GPT_OSS = MoESpec(8, 12, RouterSpec(3, normalize=True, bias=True), "clamped_silu", bias=True)
GROUPS = {"groups": 4, "top_groups": 2, "group_score": "top2"}
DEEPSEEK = MoESpec(8, 12, RouterSpec(3, "sigmoid", True, 2.5, correction=True, **GROUPS))
FIVE_EXPERTS = dataclasses.replace(GPT_OSS, num_experts=5, shared=MLPSpec(8, "silu"))
SPECS = {
    "mixtral": MIXTRAL,
    "qwen": QWEN,
    "gpt-oss": GPT_OSS,
    "deepseek": DEEPSEEK,
    "five experts": FIVE_EXPERTS,
}


def make(spec: MoESpec, seed: int = 0) -> tuple[Params, jax.Array]:
    """Random weights, biases among them, and tokens."""
    rng = np.random.default_rng(seed)
    params = {
        path: jnp.asarray(rng.normal(0, 0.6, param.shape), jnp.float32)
        for path, param in moe.declare(spec, HIDDEN).items()
    }
    return params, jnp.asarray(rng.normal(size=(TOKENS, HIDDEN)), jnp.float32)


def dense(spec: MoESpec, params: Params, x: jax.Array) -> np.ndarray:
    """All experts on all tokens, in float64."""
    w = {path: np.asarray(array, np.float64) for path, array in params.items()}
    tokens = np.asarray(x, np.float64)

    def gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        if spec.activation == "silu":
            return gate * sigmoid(gate) * up
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return (up + 1) * gate * sigmoid(1.702 * gate)

    logits = tokens @ w["router"].T + w.get("router_bias", 0)
    experts, own = route(spec.router, logits, w.get("router_correction"))
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, experts, own, 1)
    total = np.zeros_like(tokens)
    for expert in range(spec.num_experts):
        gate, up = np.einsum("pfh,th->ptf", w["experts_up"][expert], tokens)
        if spec.bias:
            gate, up = gate + w["experts_up_bias"][expert, 0], up + w["experts_up_bias"][expert, 1]
        y = gated(gate, up) @ w["experts_down"][expert].T
        y += w["experts_down_bias"][expert] if spec.bias else 0
        total += weights[:, expert, None] * y
    if spec.shared is not None:
        gate, up = np.einsum("pfh,th->ptf", w["shared/up"], tokens)
        y = (gate * sigmoid(gate) * up) @ w["shared/down"].T
        total += y * (sigmoid(tokens @ w["shared_gate"].T) if spec.shared_gate else 1)
    return total


def run(
    spec: MoESpec,
    params: Params,
    x: jax.Array,
    devices: int = 1,
    is_token: jax.Array | None = None,
) -> np.ndarray:
    """The layer's output, with weights split as the engine splits them."""
    apply = functools.partial(moe.apply, spec, is_token=is_token)
    if devices > 1:
        mesh = make_mesh(devices)
        tree = moe.declare(spec, HIDDEN)
        specs = partition_specs(tree, LOGICAL_TO_MESH, dict(mesh.shape))
        params = {
            path: jax.device_put(array, NamedSharding(mesh, specs[path]))
            for path, array in params.items()
        }
        apply = jax.shard_map(
            apply,
            mesh=mesh,
            in_specs=(specs, PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    return np.asarray(jax.jit(apply)(params, x), np.float64).sum(0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_output_equals_a_dense_loop_on_any_number_of_devices(name: str, devices: int) -> None:
    """2 and 4 divide the 8 experts; of 5 experts they divide the width alone."""
    params, x = make(SPECS[name])
    want = dense(SPECS[name], params, x)
    got = run(SPECS[name], params, x, devices)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("devices", [1, 2])
def test_padding_goes_through_no_experts(devices: int) -> None:
    params, x = make(MIXTRAL)
    is_token = jnp.arange(x.shape[0]) % 3 > 0
    got = run(MIXTRAL, params, x, devices, is_token)
    np.testing.assert_array_equal(got[~is_token], 0)
    np.testing.assert_array_equal(got[is_token], run(MIXTRAL, params, x, devices)[is_token])


@pytest.mark.parametrize(
    ("experts", "split"), [(8, ("tensor", None)), (5, (None, "tensor"))], ids=["experts", "width"]
)
def test_what_devices_split(experts: int, split: tuple[str | None, str | None]) -> None:
    tree = moe.declare(dataclasses.replace(GPT_OSS, num_experts=experts), HIDDEN)
    specs = partition_specs(tree, LOGICAL_TO_MESH, {"tensor": 4})
    by_expert, by_width = split
    assert specs["experts_up"] == PartitionSpec(by_expert, None, by_width, None)
    assert specs["experts_down"] == PartitionSpec(by_expert, None, by_width)
    assert specs["experts_up_bias"] == PartitionSpec(by_expert, None, by_width)
    assert specs["experts_down_bias"] == PartitionSpec(by_expert, None)
    assert specs["router"] == PartitionSpec(None, None)


@pytest.mark.parametrize("name", ["gpt-oss", "five experts"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_last_bias_is_added_once(name: str, devices: int) -> None:
    """Where it alone is left and the weights sum to 1, it comes out as it is."""
    params, x = make(SPECS[name])
    params = {path: jnp.zeros_like(a) if "down" in path else a for path, a in params.items()}
    params["experts_down_bias"] = jnp.full_like(params["experts_down_bias"], 3.0)
    np.testing.assert_allclose(run(SPECS[name], params, x, devices), 3.0, rtol=1e-6)


def test_the_router_is_the_one_that_is_asked_for() -> None:
    params, x = make(GPT_OSS)
    all_on_the_first = jnp.zeros((TOKENS, 3), jnp.int32), jnp.ones((TOKENS, 3)) / 3

    def router(x: jax.Array, w: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        assert options["top_k"] == 3 and options["bias"] is params["router_bias"]
        return all_on_the_first

    got = moe.apply(GPT_OSS, params, x, Kernels(route_experts=router)).sum(0)
    others = {path: a.at[1:].add(1) for path, a in params.items() if "experts" in path}
    same = moe.apply(GPT_OSS, params | others, x, Kernels(route_experts=router)).sum(0)
    np.testing.assert_array_equal(got, same)
