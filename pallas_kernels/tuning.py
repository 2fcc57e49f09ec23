"""The tuned configurations of implementations, as ``python -m pallas_kernels.lab tune`` wrote them.

One checked-in JSON file per device kind, ``tuned/<slug>.json``:
``{op: {implementation: {key: {"config": {...}, ...}}}}``. The implementation makes the key, from
the shapes and dtypes that matter to it; beside the configuration stands what was measured.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.lowering import abstract_device

FOLDER = Path(__file__).parent / "tuned"


def device_kind() -> str:
    """The kind of device that the code now being traced is for, as JAX spells it."""
    device = abstract_device()
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def path(kind: str, folder: Path | None = None) -> Path:
    """The file of a device kind: "NVIDIA H200" has nvidia_h200.json."""
    return (folder or FOLDER) / f"{re.sub(r'[^a-z0-9]+', '_', kind.lower()).strip('_')}.json"


def lookup(op: str, implementation: str, key: str) -> dict[str, Any] | None:
    """The best known configuration for the device now being traced for; None if none is known.

    Args:
        op: an op's name.
        implementation: a name in the op's ``IMPLEMENTATIONS``.
        key: what the implementation's ``tuning_key`` gives for the arguments.
    """
    entry = read(path(device_kind())).get(op, {}).get(implementation, {}).get(key)
    return entry["config"] if entry is not None else None


@functools.cache
def read(file: Path) -> dict[str, Any]:
    """A file's content, read once; empty where there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
