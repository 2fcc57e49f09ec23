"""Keeps lowered programs between runs, beside the compiled ones.

A compiled program is found by its lowered form, and to trace and lower all programs of a model
takes longer than to read them compiled. So the lowered form is kept too: StableHLO with the kernels
in it, as ``jax.export`` writes it (no pickle). It is found by everything that it depends on: our
code, JAX's version and settings, the kind of device, the model, the shapes. As with the compiled
programs, whoever can write there can make us run code.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export
from jax.sharding import Mesh

import pallas_kernels
from jaxserve.files import written_whole
from jaxserve.log import logger

ROOTS = Path(__file__).parents[1], Path(pallas_kernels.__path__[0])
FOLDER = "lowered"
"""Of the compile cache."""
CODE = ("*.py", "*.json")
KERNEL_CALLS = ("__gpu$xla.gpu.triton", "mosaic_gpu_v2", "tpu_custom_call")
"""What kernels are called in a lowered program. JAX doesn't promise that another version
understands them, but no other version looks for our files."""
SETTINGS = (
    *("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl"),
    *("jax_threefry_partitionable", "jax_numpy_dtype_promotion", "jax_debug_nans"),
)
CHECKSUM_BYTES = 32


def register(*kinds: type) -> None:
    """Lets dataclasses of arrays only be arguments and results of programs that are kept."""
    for kind in kinds:
        jax.export.register_pytree_node_serialization(
            kind,
            serialized_name=f"jaxserve.{kind.__name__}",
            serialize_auxdata=lambda nothing: b"",
            deserialize_auxdata=lambda nothing: (),
        )


class LoweredPrograms:
    """Lowers functions, or reads what was lowered before.

    Args:
        directory: where compiled programs are kept; None if they aren't.
        mesh: the devices. Programs of several are not kept.
        facts: all that the functions have closed over, with a repr that tells it fully.
    """

    def __init__(self, directory: str | None, mesh: Mesh, *facts: Any) -> None:
        self._folder: Path | None = None
        if directory is not None and mesh.size == 1:
            self._folder = Path(directory) / FOLDER
            device = mesh.devices.item()
            settings = {name: getattr(jax.config, name, None) for name in SETTINGS}
            versions = jax.__version__, version("jaxlib"), _code_digest()
            where = device.platform, device.device_kind, getattr(device, "core_count", None)
            self._facts = repr((versions, where, settings, facts))

    def lower(
        self, key: tuple[Any, ...], function: Callable, *avals: Any, **options: Any
    ) -> jax.stages.Lowered:
        """The lowered ``jax.jit(function, **options)`` for arguments of these shapes, dtypes and
        shardings; ``key``, which begins with a name, tells the functions of a model apart."""
        jitted = jax.jit(function, **options)
        if self._folder is None:
            return jitted.lower(*avals)
        path = self._folder / self._name(key, avals, options)
        exported = _read(path)
        if exported is None:
            checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in KERNEL_CALLS]
            try:
                exported = jax.export.export(jitted, disabled_checks=checks)(*avals)
                _write(path, exported)
            except (ImportError, OSError, ValueError, NotImplementedError) as reason:
                logger.warning("%s can't be kept lowered: %s", key, reason)
                return jitted.lower(*avals)

        def call(*args: Any) -> Any:
            return exported.call(*args)

        call.__name__ = key[0]  # what profiles and the compile cache show
        # Also the first time, so that the compiled program is found the next time.
        return jax.jit(call, **options).lower(*avals)

    def _name(self, key: tuple[Any, ...], avals: Any, options: dict[str, Any]) -> str:
        leaves, tree = jax.tree.flatten(avals)
        shapes = [(leaf.shape, leaf.dtype, leaf.sharding.spec) for leaf in leaves]
        told = repr((self._facts, key, str(tree), shapes, options))
        return f"{key[0]}-{hashlib.sha256(told.encode()).hexdigest()}"


@functools.cache
def _code_digest() -> str:
    """Of our code and the tables it reads."""
    digest = hashlib.sha256()
    for root in ROOTS:
        for path in sorted(path for pattern in CODE for path in root.rglob(pattern)):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> jax.export.Exported | None:
    """What ``_write`` wrote; None if there is nothing, or it is broken."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, data = data[:CHECKSUM_BYTES], data[CHECKSUM_BYTES:]
    if hashlib.sha256(data).digest() != checksum:
        return None
    try:
        exported = jax.export.deserialize(bytearray(data))
        os.utime(path)  # when it was used last, for ``jaxserve cache``
    except (ImportError, OSError, ValueError):
        return None
    return exported


def _write(path: Path, exported: jax.export.Exported) -> None:
    data = exported.serialize()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with written_whole(path) as file:
        file.write(hashlib.sha256(data).digest() + data)
