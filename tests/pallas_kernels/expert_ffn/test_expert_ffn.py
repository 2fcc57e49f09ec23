"""The op against its formula in float64 numpy, one token and one expert at a time."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_ffn import expert_ffn

Arguments = dict[str, Any]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def clamped_silu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gpt-oss's, see its model card (arXiv:2508.10925) and published code."""
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return (up + 1) * gate * sigmoid(1.702 * gate)


GATED = {
    "silu": lambda gate, up: gate * sigmoid(gate) * up,
    "relu": lambda gate, up: np.maximum(gate, 0) * up,
    "clamped_silu": clamped_silu,
}


def make(
    tokens: int = 7,
    hidden: int = 13,
    size: int = 9,
    count: int = 5,
    top_k: int = 3,
    bias: bool = False,
    scale: float = 0.5,
    seed: int = 0,
) -> Arguments:
    """Random arguments; each token's experts differ."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(np.float32)

    arguments: Arguments = {
        "x": normal(tokens, hidden),
        "experts": np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)]).astype("i4"),
        "weights": rng.uniform(size=(tokens, top_k)).astype(np.float32),
        "up": normal(count, 2, size, hidden),
        "down": normal(count, hidden, size),
    }
    if bias:
        arguments |= {"up_bias": normal(count, 2, size), "down_bias": normal(count, hidden)}
    return arguments


def oracle(arguments: Arguments, activation: str = "silu") -> np.ndarray:
    wide = {
        name: np.asarray(value, np.float64)
        for name, value in arguments.items()
        if name != "experts"
    }
    total = np.zeros_like(wide["x"])
    for token, k in np.ndindex(arguments["experts"].shape):
        expert = arguments["experts"][token, k]
        if 0 <= expert < len(wide["up"]):
            h = wide["up"][expert] @ wide["x"][token]
            h = h + (wide["up_bias"][expert] if "up_bias" in wide else 0)
            y = wide["down"][expert] @ GATED[activation](*h)
            y = y + (wide["down_bias"][expert] if "down_bias" in wide else 0)
            total[token] += wide["weights"][token, k] * y
    return total


def check(arguments: Arguments, activation: str = "silu", tolerance: float = 1e-5) -> None:
    given = {name: jnp.asarray(value) for name, value in arguments.items()}
    got = expert_ffn(**given, activation=activation, implementation="reference")
    assert got.dtype == given["x"].dtype
    want = oracle(arguments, activation)
    error = np.abs(np.asarray(got, np.float64).sum(0) - want).max()
    assert error <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", GATED)
def test_every_activation_with_and_without_biases(activation: str, bias: bool) -> None:
    check(make(bias=bias, scale=2.0), activation)  # large enough for what is clamped


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "hidden": 3, "size": 1, "count": 2, "top_k": 1},
        {"tokens": 1, "top_k": 5},
        {"tokens": 33, "count": 1, "top_k": 1},
        {"tokens": 2, "count": 61, "top_k": 4},
        {"tokens": 130, "hidden": 17, "size": 31, "count": 7, "top_k": 2},
    ],
)
def test_odd_sizes(sizes: dict[str, int]) -> None:
    check(make(**sizes, bias=True))


def test_experts_that_nobody_chose() -> None:
    arguments = make(top_k=2, bias=True)
    check(arguments | {"experts": np.array([[1, 3]] * 7, np.int32)})


@pytest.mark.parametrize("expert", [0, 2, 4])
def test_all_tokens_on_one_expert(expert: int) -> None:
    check(make(top_k=1, bias=True) | {"experts": np.full((7, 1), expert, np.int32)})


def test_a_token_that_takes_an_expert_twice() -> None:
    check(make(top_k=2, bias=True) | {"experts": np.full((7, 2), 3, np.int32)})


def test_experts_of_other_devices_add_nothing() -> None:
    """The same numbers as without them, and zero where a token has no others."""
    arguments = make(bias=True)
    arguments["experts"] = np.array(
        [[-1, 0, 5], [-5, 4, 2], [5, 9, -1], [1, 2, 3], [2**31 - 1, 3, -(2**31)]] + [[7, 8, 9]] * 2,
        np.int32,
    )
    check(arguments)
    given = {name: jnp.asarray(value) for name, value in arguments.items()}
    got = expert_ffn(**given, implementation="reference")
    assert not np.asarray(got)[:, [2, 5, 6]].any()


def test_bfloat16_is_summed_in_float32() -> None:
    """Within a rounding of each of x, the hidden values and the result."""
    arguments = {
        name: value if name in ("experts", "weights") else value.astype(jnp.bfloat16)
        for name, value in make(tokens=40, hidden=64, size=48, bias=True).items()
    }
    check(arguments, tolerance=2**-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": (5, 3, 9, 13)}, "don't fit together"),
        ({"down": (5, 13, 8)}, "don't fit together"),
        ({"x": (7, 12)}, "don't fit together"),
        ({"weights": (7, 2)}, "don't fit x"),
        ({"experts": (6, 3), "weights": (6, 3)}, "don't fit x"),
    ],
)
def test_shapes_must_fit(changes: dict[str, tuple[int, ...]], message: str) -> None:
    arguments = {name: jnp.asarray(value) for name, value in make().items()}
    arguments |= {name: jnp.zeros(s, arguments[name].dtype) for name, s in changes.items()}
    with pytest.raises(ValueError, match=message):
        expert_ffn(**arguments)
