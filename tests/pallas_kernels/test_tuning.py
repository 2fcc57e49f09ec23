"""The tables of tuned configurations, and who finds what in them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from pallas_kernels import tuning
from pallas_kernels.lab.ops import OPS, find_candidate, find_op
from tests.helpers.lowering import DEVICES

CONFIG = {"warps": 4, "tile": 64}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a table for the H200."""
    content = {"op": {"triton": {"8x64": {"config": CONFIG, "microseconds": 1.5}}}}
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(content))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "nvidia_h200.json"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3.json"),
        ("TPU v6 lite", "tpu_v6_lite.json"),
        ("cpu", "cpu.json"),
    ],
)
def test_each_device_kind_has_a_file(kind: str, name: str) -> None:
    assert tuning.path(kind).name == name


def test_the_table_of_the_device_traced_for_is_read(tables: Path) -> None:
    assert tuning.lookup("op", "triton", "8x64") is None  # the CPU that the tests run on
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=DEVICES["cuda"])):
        assert tuning.device_kind() == "NVIDIA H200"
        assert tuning.lookup("op", "triton", "8x64") == CONFIG
        assert tuning.lookup("op", "triton", "8x65") is None
        assert tuning.lookup("op", "mosaic", "8x64") is None
        assert tuning.lookup("other", "triton", "8x64") is None
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=DEVICES["tpu"])):
        assert tuning.lookup("op", "triton", "8x64") is None


def test_checked_in_tables_fit_the_implementations() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        for op, implementations in json.loads(path.read_text(encoding="utf-8")).items():
            assert op in OPS
            for name, entries in implementations.items():
                assert find_candidate(find_op(op), name).tunable()
                for entry in entries.values():
                    settings = json.dumps(entry["config"])
                    assert find_candidate(find_op(op), f"{name}@{settings}").config is not None
