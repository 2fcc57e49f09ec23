"""A step of one token through a kernel for each layer equals one through the halves."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.distributed import make_mesh
from jaxserve.model import decoder, one_token
from jaxserve.model.config import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
)
from jaxserve.model.inputs import StepInputs
from pallas_kernels.decode_layer import reference
from pallas_kernels.dispatch import CHOOSE, Kernels
from tests.helpers.dense import PAGE_SIZE, prompt_inputs, zero_cache
from tests.helpers.lowering import on_abstract

NORM = NormSpec("rms", 1e-5)
ATTENTION = AttentionSpec(4, 2, 16, 0.25, RopeSpec(10000.0, 16))
PLAIN = LayerSpec(ATTENTION, MLPSpec(96, "silu"), NORM)
LAYERS = {
    "Llama": PLAIN,
    "Qwen3": dataclasses.replace(
        PLAIN, attention=dataclasses.replace(ATTENTION, qk_norm=NormSpec("rms", 1e-6))
    ),
    "Qwen2": dataclasses.replace(PLAIN, attention=dataclasses.replace(ATTENTION, qkv_bias=True)),
    "a window": dataclasses.replace(
        PLAIN, attention=dataclasses.replace(ATTENTION, sliding_window=16)
    ),
    "experts": dataclasses.replace(PLAIN, ffn=MoESpec(6, 32, RouterSpec(2))),
    "Qwen3's experts": dataclasses.replace(
        PLAIN, ffn=MoESpec(6, 32, RouterSpec(2, normalize=True, scale=0.5))
    ),
}
OTHERS: dict[str, dict[str, Any]] = {
    "a bias behind attention": {"attention": dataclasses.replace(ATTENTION, out_bias=True)},
    "GELU": {"ffn": MLPSpec(96, "gelu")},
    "no gate": {"ffn": MLPSpec(96, "silu", gated=False)},
    "a shared expert": {"ffn": MoESpec(6, 32, RouterSpec(2), shared=MLPSpec(32, "silu"))},
    "a corrected choice": {"ffn": MoESpec(6, 32, RouterSpec(2, correction=True))},
    "sinks": {"attention": dataclasses.replace(ATTENTION, sinks=True)},
    "capped scores": {"attention": dataclasses.replace(ATTENTION, softcap=30.0)},
    "LayerNorm": {"norm": NormSpec("layer", 1e-5)},
    "norms behind": {"norm_order": "post"},
    "halves side by side": {"parallel": "one_norm"},
}


def model(*layers: LayerSpec, tied: bool = False, **settings: Any) -> ModelConfig:
    return ModelConfig("Test", 50, 64, 64, layers, NORM, tied, 64, **settings)


def one_token_step(config: ModelConfig, kernels: Kernels) -> tuple[jax.Array, Any]:
    """The logits and the cache of the 20th token's step."""
    rng, ids = np.random.default_rng(1), list(range(3, 23))
    weights = {
        path: jnp.asarray(rng.standard_normal(param.shape) * param.shape[-1] ** -0.5, jnp.float32)
        for path, param in decoder.declare(config).items()
    }
    cache = zero_cache(config, 5, PAGE_SIZE, jnp.dtype("float32"), make_mesh(1))
    _, cache = decoder.forward(config, weights, cache, prompt_inputs(config, ids[:-1]))
    forward = jax.jit(decoder.forward, static_argnums=(0, 4))
    return forward(config, weights, cache, last_token(config, ids), kernels)


def last_token(config: ModelConfig, ids: list[int]) -> StepInputs:
    inputs = prompt_inputs(config, ids)
    lengths = {"kv_len": inputs.attention.kv_len, "query_len": jnp.ones(1, jnp.int32)}
    items = {
        "decode_end": jnp.full_like(inputs.attention.decode_end, len(ids)),
        "decode_count": jnp.ones_like(inputs.attention.decode_count),
    }
    return dataclasses.replace(
        inputs,
        token_ids=inputs.token_ids[-1:],
        positions=inputs.positions[-1:],
        rope_lengths=inputs.rope_lengths[-1:],
        write_page=inputs.write_page[:, -1:],
        write_slot=inputs.write_slot[-1:],
        sample_index=None,
        attention=dataclasses.replace(inputs.attention, **lengths, **items),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_kernel_equals_the_halves(kind: str, tied: bool) -> None:
    calls = []

    def whole(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[-1].next.shape)
        return reference.decode_layer(*args, **kwargs)

    config = model(*[LAYERS[kind]] * 3, tied=tied)
    logits, cache = one_token_step(config, Kernels(decode_layer=whole))
    assert calls[0] == (2 * 4 * 16, 64) and calls[-1] == (50, 64)  # the head
    plain, plain_cache = one_token_step(config, CHOOSE)
    np.testing.assert_allclose(logits, plain, atol=1e-4)
    for pages, same in zip(jax.tree.leaves(cache), jax.tree.leaves(plain_cache), strict=True):
        np.testing.assert_allclose(pages, same, atol=1e-5)


@pytest.mark.parametrize("what", OTHERS)
def test_layers_that_the_kernel_does_not_know_go_through_their_halves(what: str) -> None:
    config = model(PLAIN, dataclasses.replace(PLAIN, **OTHERS[what]))
    assert not one_token.fits(config, CHOOSE, last_token(config, [1, 2]))


@pytest.mark.parametrize(
    "changes",
    [{"logit_softcap": 30.0}, {"final_norm": None}, {"embedding_size": 32}],
    ids=lambda changes: next(iter(changes)),
)
def test_so_do_models_with_another_head(changes: dict[str, Any]) -> None:
    config = model(PLAIN)
    inputs = last_token(config, [1, 2])
    assert one_token.fits(config, CHOOSE, inputs)
    assert not one_token.fits(dataclasses.replace(config, **changes), CHOOSE, inputs)


@pytest.mark.parametrize("op", ["paged_attention", "fused_linear", "add_rms_norm", "expert_ffn"])
def test_someone_elses_kernels_for_a_part_are_used(op: str) -> None:
    config = model(PLAIN)
    inputs = last_token(config, [1, 2])
    assert not one_token.fits(config, Kernels(**{op: "reference"}), inputs)
    both = Kernels(**{op: "reference"}, decode_layer="reference")
    assert one_token.fits(config, both, inputs)


def test_more_tokens_go_through_the_halves() -> None:
    config = model(PLAIN)
    assert not one_token.fits(config, CHOOSE, prompt_inputs(config, [1, 2]))


def test_steps_of_one_token_gain_on_hopper_gpus_in_16_bits() -> None:
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert not one_token.gains(model(PLAIN), half)  # on a CPU
    with on_abstract("cuda"):
        assert one_token.gains(model(PLAIN), half)
        assert not one_token.gains(model(PLAIN), single)
        other = dataclasses.replace(PLAIN, **OTHERS["a shared expert"])
        assert not one_token.gains(model(PLAIN, other), half)
    with on_abstract("tpu"):
        assert not one_token.gains(model(PLAIN), half)
