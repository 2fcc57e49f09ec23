"""A TPU simulated on a CPU, for kernels."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

SIMULATED = pltpu.InterpretParams(detect_races=True)
"""Memory that nothing wrote is NaN, copies happen as late as they may, races are printed."""


@pytest.fixture(autouse=True, scope="module")
def quick_compiling() -> Iterator[None]:
    """The simulator is a large program that does little: optimizing it costs more than it saves.

    Acts on the modules that import it.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
