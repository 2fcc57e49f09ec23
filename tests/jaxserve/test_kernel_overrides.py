"""A kernel of the user's own, by name, in the engine."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from converters import open_checkpoint
from converters.families import deepseek_v2
from jaxserve import demo
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.kernels import overridden
from pallas_kernels.dispatch import CHOOSE, Kernels
from pallas_kernels.latent_attention.reference import latent_attention
from pallas_kernels.route_experts.reference import route_experts
from tests.converters.families.test_deepseek_v2 import SMALL as DEEPSEEK_V2
from tests.helpers import toy_kernels
from tests.helpers.engines import ROWS, STEP_TOKENS, greedy_params, small_llm, tokens_of

TOYS = "tests.helpers.toy_kernels"
PROMPTS = [[5, 6, 7, 8, 9], [11, 12]]


def run(**overrides: str) -> tuple[list[list[int]], set[tuple[str, int]]]:
    """An engine's tokens with these overrides, and the toys that its steps were traced with."""
    toy_kernels.traces.clear()
    with small_llm(demo.target_path(), kernel_overrides=overrides) as llm:
        tokens = tokens_of(llm, PROMPTS, greedy_params(6))
    return tokens, {trace for trace in toy_kernels.traces if trace[1] in (ROWS, STEP_TOKENS)}


def test_the_engine_uses_the_kernel_and_no_trace_of_another_engine() -> None:
    plain, none = run()
    own, traces = run(paged_attention=f"{TOYS}:attention")
    assert own == plain and none == set()
    assert traces == {("attention", ROWS), ("attention", STEP_TOKENS)}
    assert run() == (plain, set())


def test_what_the_kernel_cannot_run_is_left_to_ours() -> None:
    tokens, traces = run(paged_attention=f"{TOYS}:attention_for_decoding")
    assert traces == {("attention_for_decoding", ROWS)} and tokens == run()[0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("attention_with_wrong_scale", r"gate 'values', in Case\(name='decode', .* relative error"),
        ("attention_that_reads_padding", "gate 'finite', .*: output 0 at .* was padding read"),
        ("attention_for_nothing", "can run no case of paged_attention: decode .not written yet"),
        ("there_is_no_such_thing", "has no function 'there_is_no_such_thing'"),
    ],
)
def test_a_kernel_that_fails_its_gates_is_refused(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_llm(demo.target_path(), kernel_overrides={"paged_attention": f"{TOYS}:{function}"})


def test_a_kernel_for_latent_attention_is_tested_on_the_latent_layers() -> None:
    model = deepseek_v2.config(DEEPSEEK_V2)
    where, dtype = "pallas_kernels.latent_attention.reference:latent_attention", jnp.float32
    kernels = overridden({"latent_attention": where}, model, 16, jnp.dtype(dtype))
    assert kernels == Kernels(latent_attention=latent_attention)
    for op, function, message in (
        ("latent_attention", f"{TOYS}:latent_attention_with_wrong_scale", "gate 'values'"),
        ("paged_attention", f"{TOYS}:attention", "no layer of the model has paged_attention"),
    ):
        with pytest.raises(ConfigError, match=message):
            overridden({op: function}, model, 16, jnp.dtype(dtype))


def test_a_router_is_tested_on_the_layers_with_experts() -> None:
    override = {"route_experts": "pallas_kernels.route_experts.reference:route_experts"}
    experts, dense = deepseek_v2.config(DEEPSEEK_V2), open_checkpoint(demo.target_path()).config
    kernels = overridden(override, experts, 16, jnp.dtype("float32"))
    assert kernels == Kernels(route_experts=route_experts)
    with pytest.raises(ConfigError, match="no layer of the model has route_experts"):
        overridden(override, dense, 16, jnp.dtype("float32"))


def test_an_unknown_module_is_refused() -> None:
    model = open_checkpoint(demo.target_path()).config
    with pytest.raises(ConfigError, match="no module 'no_such_module'"):
        overridden({"paged_attention": "no_such_module:f"}, model, 16, jnp.dtype("float32"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"paged": "a:b"}, "there is no op 'paged'; use .*paged_attention"),
        ({"paged_attention": "a.b"}, "'paged_attention' needs 'module:function', not 'a.b'"),
        ({"paged_attention": 3}, "needs 'module:function', not 3"),
        ("paged_attention", "must map ops"),
    ],
)
def test_overrides_are_checked_before_anything_is_loaded(overrides: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(kernel_overrides=overrides)


def test_kernels_are_static_arguments() -> None:
    function = toy_kernels.attention
    assert hash(Kernels(paged_attention=function)) == hash(Kernels(paged_attention=function))
    assert Kernels(paged_attention=function) != CHOOSE
