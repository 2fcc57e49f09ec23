"""Facts about the machine that need no JAX, and advice drawn from them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from jaxserve import __version__

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax"),
    *("numpy", "ml_dtypes", "transformers", "tokenizers", "safetensors", "orbax-checkpoint"),
)
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
MIN_DRIVER = {"jax-cuda13-plugin": 580, "jax-cuda12-plugin": 525}
"""The oldest NVIDIA driver that each plugin works with."""
PREFIXES = (
    *("JAX", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_", "NCCL_", "TRANSFORMERS_"),
    *("HF_", "VLLM_", "OMP_", "LD_LIBRARY_PATH", "XDG_CACHE_HOME"),
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CREDENTIAL|COOKIE", re.IGNORECASE)


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter, "not installed" included."""
    found = {"python": platform.python_version(), "jaxserve": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name not in (*CUDA_PLUGINS, "libtpu"):
                found[name] = "not installed"
    return found


def host() -> dict[str, Any]:
    """System, cores and memory."""
    memory = psutil.virtual_memory()
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        usable = os.cpu_count() or 1
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "usable_cores": usable,
        "memory_total": memory.total,
        "memory_available": memory.available,
    }


def nvidia_gpus() -> list[str]:
    """What the driver says about NVIDIA GPUs, whether or not JAX can use them."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        query = "--query-gpu=name,memory.total,driver_version"
        try:
            answer = subprocess.run(
                [program, query, "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
            return _rows(answer.stdout)
        except (OSError, subprocess.SubprocessError) as error:
            return [f"nvidia-smi doesn't answer: {error}"]
    nodes = sorted(str(node) for node in Path("/dev").glob("nvidia[0-9]*"))
    if not nodes and Path("/proc/driver/nvidia/version").exists():
        return ["a driver is loaded, but no GPU is visible"]
    return nodes


def _rows(text: str) -> list[str]:
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]
    return [f"{row[0]}, {row[1]}, driver {row[-1]}" for row in rows if len(row) >= 3]


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that change what we do; of secrets only that they are set."""
    shown = {}
    for name in sorted(variables):
        if name.startswith(PREFIXES):
            hidden = SECRET.search(name)
            # A URL may carry a password as well.
            value = re.sub(r"//[^/@\s]*@", "//...@", variables[name])
            shown[name] = "(set, not shown)" if hidden else value
    return shown


def folder(path: str) -> dict[str, Any]:
    """How much a directory holds."""
    sizes = []
    for entry in os.scandir(path) if os.path.isdir(path) else ():
        if entry.is_file() and not entry.name.endswith("-atime"):
            sizes.append(entry.stat().st_size)
    return {"directory": path, "entries": len(sizes), "bytes": sum(sizes)}


def advice(used: str | None, error: str | None, report: Mapping[str, Any]) -> list[str]:
    """What to do, most urgent first.

    Args:
        used: JAX's platform.
        error: why JAX didn't start.
        report: the rest of the facts.
    """
    texts = []
    if error is not None:
        texts.append(f"JAX can't start: {error}")
        if "JAX_PLATFORMS" in report["environment"]:
            texts.append("Unset JAX_PLATFORMS to let JAX choose a platform that there is.")
    if used in (None, "cpu"):
        texts += _why_no_gpu(report)
        texts += _why_no_tpu(report)
    if not texts and used == "cpu":
        texts.append("No GPU or TPU was found, so models run on the CPU.")
    if sys.version_info >= (3, 14):
        texts.append("Python 3.14 and newer are untested; use 3.11 to 3.13.")
    return texts


def _why_no_gpu(report: Mapping[str, Any]) -> list[str]:
    gpus, variables = report["nvidia_gpus"], report["environment"]
    if not gpus:
        return []
    chosen = variables.get("JAX_PLATFORMS", "")
    if chosen and not {"cuda", "gpu"} & set(chosen.split(",")):
        return [f"JAX_PLATFORMS={chosen} keeps JAX off the GPU; unset it to use the GPU."]
    if variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ["CUDA_VISIBLE_DEVICES hides every GPU; unset it to use the GPU."]
    plugins = [name for name in CUDA_PLUGINS if name in report["versions"]]
    if not plugins:
        return [
            "There is an NVIDIA GPU, but JAX has no CUDA plugin: "
            'pip install "jaxserve[cuda]" (from a checkout: pip install ".[cuda]")'
        ]
    driver = re.search(r"driver (\d+)", gpus[0])
    if driver and int(driver[1]) < MIN_DRIVER[plugins[0]]:
        return [
            f"{plugins[0]} needs an NVIDIA driver from {MIN_DRIVER[plugins[0]]} on, but there is "
            f"{driver[1]}: update the driver, or try pip install jax[cuda12]."
        ]
    jax, plugin = report["versions"]["jax"], report["versions"][plugins[0]]
    if jax != plugin:
        return [f"jax {jax} and {plugins[0]} {plugin} differ: pip install -U jax[cuda13]=={jax}"]
    return ["The CUDA plugin is installed but found no GPU; JAX_PLATFORMS=cuda shows its error."]


def _why_no_tpu(report: Mapping[str, Any]) -> list[str]:
    names = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")
    if not any(Path("/dev").glob("accel[0-9]*")) and not any(map(os.environ.get, names)):
        return []
    if "libtpu" not in report["versions"]:
        return ['This looks like a TPU machine without libtpu: pip install "jaxserve[tpu]"']
    return ["libtpu is installed but JAX found no TPU; another process may be using it."]
