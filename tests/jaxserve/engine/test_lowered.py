"""Lowered programs are kept, and found only where nothing has changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.distributed import make_mesh
from jaxserve.engine import lowered
from jaxserve.engine.lowered import FOLDER, LoweredPrograms

MESH = make_mesh(1)
SHARDING = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec())
AVAL = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=SHARDING)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pair:
    a: jax.Array
    b: jax.Array | None


lowered.register(Pair)


class Function:
    """Adds up a pair; counts how often it is traced."""

    def __init__(self) -> None:
        self.traced = 0

    def __call__(self, pair: Pair, x: jax.Array) -> Pair:
        self.traced += 1
        return Pair(pair.a + x, None)


def lower(
    directory: Path | str | None, function: Function, key: str = "add", facts: Any = 1
) -> jax.stages.Lowered:
    programs = LoweredPrograms(None if directory is None else str(directory), MESH, facts)
    options: dict[str, Any] = {"donate_argnums": 0, "out_shardings": SHARDING}
    # A new function each time: JAX itself remembers those that it traced in this process.
    return programs.lower((key,), lambda *args: function(*args), Pair(AVAL, None), AVAL, **options)


def test_what_was_lowered_once_is_not_traced_again(tmp_path: Path) -> None:
    first, second = Function(), Function()
    texts = [lower(tmp_path, function).as_text() for function in (first, second)]
    assert (first.traced, second.traced) == (1, 0)
    assert texts[0] == texts[1]  # so that the compiled program is found too


def test_a_kept_program_computes_the_same_and_takes_over_the_buffers(tmp_path: Path) -> None:
    for _ in range(2):
        program = lower(tmp_path, Function()).compile()
        state = jax.device_put(jnp.arange(4.0), SHARDING)
        result = program(Pair(state, None), np.ones(4, np.float32))
        assert isinstance(result, Pair) and result.b is None
        np.testing.assert_array_equal(result.a, [1, 2, 3, 4])
        assert state.is_deleted()


def test_other_facts_keys_settings_and_code_are_traced_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = Function()
    lower(tmp_path, function)
    lower(tmp_path, function, facts=2)
    lower(tmp_path, function, key="other")
    with jax.default_matmul_precision("float32"):
        lower(tmp_path, function)
    monkeypatch.setattr(lowered, "_code_digest", lambda: "other code")
    lower(tmp_path, function)
    assert function.traced == 5


@pytest.mark.parametrize("data", [b"", b"short", bytes(1000)])
def test_a_broken_file_is_replaced(tmp_path: Path, data: bytes) -> None:
    function = Function()
    lower(tmp_path, function)
    (file,) = (tmp_path / FOLDER).iterdir()
    whole = file.read_bytes()
    file.write_bytes(data or whole[:-1])
    lower(tmp_path, function)
    assert function.traced == 2
    assert len(file.read_bytes()) == len(whole)


def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    function = Function()
    for _ in range(2):
        lower(None, function).compile()
    assert function.traced == 2


def test_where_nothing_can_be_written_programs_are_lowered_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    lower(tmp_path, Function()).compile()
    assert "can't be kept" in caplog.text
