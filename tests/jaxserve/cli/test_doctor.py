"""The doctor: a report that is complete, pasteable and free of secrets, and its advice."""

from __future__ import annotations

import json
from typing import Any

import jax
import pytest

from jaxserve.__main__ import main
from jaxserve.cli import doctor, machine


def test_doctor_reports_and_passes_its_self_test(capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret@example.org/x")
    assert main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text)
    assert report["ok"] and report["jax"]["error"] is None
    assert report["versions"]["jax"] == jax.__version__
    assert len(report["devices"]) == len(report["self_test"]) == jax.local_device_count()
    assert report["attention"]["implementation"] in ("triton", "reference")
    assert report["compile_cache"]["entries"] >= 0
    assert "secret" not in text
    assert report["environment"]["HF_ENDPOINT"] == "https://...@example.org/x"
    lines = doctor.render(report).splitlines()
    assert lines[-1].split() == ["result", "all", "is", "well"]
    assert any("HF_TOKEN=(set, not shown)" in line for line in lines)


def test_a_jax_that_does_not_start_is_reported(capsys, monkeypatch) -> None:
    def fail() -> None:
        raise RuntimeError("Unknown backend:\n'nonsense'")

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "nothing: Unknown backend: 'nonsense'" in out
    assert "Unset JAX_PLATFORMS" in out and "FAILED" in out


def facts(**changes: Any) -> dict[str, Any]:
    """A report of a machine with a GPU."""
    versions = {"jax": "0.10.2", "jax-cuda13-plugin": "0.10.2"}
    report = {"nvidia_gpus": ["H, 9 MiB, driver 590.1"], "versions": versions, "environment": {}}
    return report | changes


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (facts(versions={"jax": "0.10.2"}), 'pip install "jaxserve[cuda]"'),
        (facts(environment={"JAX_PLATFORMS": "cpu"}), "JAX_PLATFORMS=cpu keeps JAX off the GPU"),
        (facts(environment={"CUDA_VISIBLE_DEVICES": ""}), "CUDA_VISIBLE_DEVICES hides"),
        (facts(nvidia_gpus=["H, 9 MiB, driver 550.9"]), "needs an NVIDIA driver from 580 on"),
        (facts(versions={"jax": "0.11.0", "jax-cuda13-plugin": "0.10.2"}), "differ"),
        (facts(), "JAX_PLATFORMS=cuda shows its error"),
        (facts(nvidia_gpus=[]), "No GPU or TPU was found"),
    ],
)
def test_advice_when_jax_runs_on_the_cpu(report: dict[str, Any], text: str) -> None:
    assert text in " ".join(machine.advice("cpu", None, report))


def test_no_advice_when_the_gpu_is_used() -> None:
    assert machine.advice("gpu", None, facts()) == []
