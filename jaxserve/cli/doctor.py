"""``jaxserve doctor``: what the machine has, what JAX makes of it, and what to do about it."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from jaxserve.cli import machine
from jaxserve.cli.flags import Parser

if TYPE_CHECKING:
    import jax

HELP = "check devices, drivers, versions and settings"
SIZE = 1024
"""Of the matrices that the self-test multiplies."""
GIB = 2**30


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve doctor [--json]",
        description="Checks devices, drivers, versions and settings, and says what to do. The "
        "output holds no secrets and is made for pasting.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: Namespace) -> int:
    """Prints the report; the exit code is 1 if JAX doesn't work."""
    report = make_report()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0 if report["ok"] else 1


def make_report() -> dict[str, Any]:
    """Everything, as plain values that JSON can hold."""
    report: dict[str, Any] = {
        "versions": machine.versions(),
        "host": machine.host(),
        "nvidia_gpus": machine.nvidia_gpus(),
        "environment": machine.environment(),
    }
    # Else JAX takes most of the memory of a GPU that somebody may be using.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    error, devices = None, []
    try:
        import jax

        devices = jax.local_devices()
    except Exception as failure:  # JAX raises many kinds when it can't start
        error = " ".join(str(failure).split())
    platform = devices[0].platform if devices else None
    report["jax"] = {"platform": platform, "error": error}
    report["devices"] = [_describe(device) for device in devices]
    if devices:
        report["compile_cache"] = _compile_cache()
        report["self_test"] = [_multiply(device) for device in devices]
        report["attention"] = _attention(platform)
    report["advice"] = machine.advice(platform, error, report)
    tests = [*report.get("self_test", []), report.get("attention", {"ok": False})]
    report["ok"] = all(test["ok"] for test in tests)
    return report


def _describe(device: jax.Device) -> dict[str, Any]:
    stats = device.memory_stats() or {}
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_in_use": stats.get("bytes_in_use"),
        "memory_limit": stats.get("bytes_limit"),
    }


def _compile_cache() -> dict[str, Any]:
    from jaxserve.engine.programs import compilation_cache_dir, use_compilation_cache

    use_compilation_cache(None)
    return machine.folder(compilation_cache_dir() or "")


def _multiply(device: jax.Device) -> dict[str, Any]:
    """A jitted matrix product on one device: whether it is right, and how long it takes."""
    import jax
    import jax.numpy as jnp

    try:
        x = jax.device_put(jnp.ones((SIZE, SIZE), jnp.bfloat16), device)
        multiply = jax.jit(lambda x: x @ x)
        start = time.perf_counter()
        right = bool((multiply(x) == SIZE).all())
        compiled = time.perf_counter()
        multiply(x).block_until_ready()
        end = time.perf_counter()
    except Exception as failure:  # whatever it is, it belongs into the report
        return {"device": device.id, "ok": False, "error": " ".join(str(failure).split())}
    return {
        "device": device.id,
        "ok": right,
        "first_ms": round((compiled - start) * 1e3, 2),
        "next_ms": round((end - compiled) * 1e3, 2),
    }


def _attention(platform: str | None) -> dict[str, Any]:
    """Which implementation of attention is chosen, and whether it agrees with the reference."""
    import jax
    import numpy as np

    from pallas_kernels.paged_attention import IMPLEMENTATIONS, cases, paged_attention

    case = cases.Case("doctor", ((1, 40), (1, 17)), padding=0, dtype="bfloat16")
    arguments = cases.make(case, 0, split=platform != "cpu")
    refusals = {}
    for name in IMPLEMENTATIONS:
        try:
            out, wanted = (
                np.asarray(
                    jax.jit(lambda name=which: paged_attention(**arguments, implementation=name))(),
                    np.float32,
                )
                for which in (name, "reference")
            )
        except NotImplementedError as reason:
            refusals[name] = str(reason)
            continue
        except Exception as failure:  # whatever it is, it belongs into the report
            error = " ".join(str(failure).split())
            return {"ok": False, "implementation": name, "error": error, "refused": refusals}
        ok = bool(np.allclose(out, wanted, atol=0.05))
        return {"ok": ok, "implementation": name, "refused": refusals}
    return {"ok": False, "implementation": None, "refused": refusals}


# --- plain text -----------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    host = report["host"]
    memory = f"{host['memory_available'] / GIB:.1f} of {host['memory_total'] / GIB:.1f} GiB free"
    rows = [("version", f"{name} {value}") for name, value in report["versions"].items()]
    rows += [
        ("system", host["system"]),
        ("host", f"{host['cores']} cores ({host['usable_cores']} usable), {memory}"),
        *(("NVIDIA GPU", gpu) for gpu in report["nvidia_gpus"]),
        ("JAX runs on", report["jax"]["platform"] or f"nothing: {report['jax']['error']}"),
        *(("device", _device_line(device)) for device in report["devices"]),
    ]
    cache = report.get("compile_cache")
    if cache:
        size = f"{cache['entries']} entries, {cache['bytes'] / 2**20:.1f} MiB"
        rows.append(("compile cache", f"{cache['directory']}: {size}"))
    rows += [("variable", f"{name}={value}") for name, value in report["environment"].items()]
    rows += [("self-test", _test_line(test)) for test in report.get("self_test", [])]
    if "attention" in report:
        rows.append(("self-test", _attention_line(report["attention"])))
    rows += [("ADVICE", text) for text in report["advice"]]
    rows.append(("result", "all is well" if report["ok"] else "FAILED"))
    return "\n".join(f"{name:14} {value}" for name, value in rows)


def _device_line(device: dict[str, Any]) -> str:
    line = f"{device['platform']} {device['id']}: {device['kind']}"
    if device["memory_limit"]:
        used, limit = device["memory_in_use"] / GIB, device["memory_limit"] / GIB
        line += f", {used:.2f} of {limit:.2f} GiB in use"
    return line


def _test_line(test: dict[str, Any]) -> str:
    name = f"matrix product on device {test['device']}"
    if "error" in test:
        return f"{name} FAILED: {test['error']}"
    word = "ok" if test["ok"] else "WRONG RESULT"
    return f"{name} {word}: {test['first_ms']} ms, then {test['next_ms']} ms"


def _attention_line(test: dict[str, Any]) -> str:
    line = f"paged attention by {test['implementation']} {'ok' if test['ok'] else 'FAILED'}"
    reasons = [f"{name} not used: {reason}" for name, reason in test["refused"].items()]
    return "; ".join([line, *([test["error"]] if "error" in test else []), *reasons])
