"""``jaxserve plan``: what a model takes and what fits beside it, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from jaxserve.cli import flags
from jaxserve.cli.flags import Parser, UsageError

if TYPE_CHECKING:
    from jaxserve.plan import Plan

HELP = "what a model takes and what fits beside it, from its config.json alone"
GIB = 2**30


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve plan [MODEL] [options]",
        description="Computes weights, KV cache and what fits on each of "
        "--tensor-parallel-size accelerators. Reads config.json only; nothing is loaded, and no "
        "accelerator is needed.",
    )
    flags.add_model(parser)
    text = "GiB of memory of each device; by default what this machine's have"
    parser.add_argument("--device-memory", type=float, metavar="X", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    flags.add_engine_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Prints the plan; the exit code is 1 if the model doesn't fit the memory."""
    arguments = flags.engine_arguments(args)
    if args.device_memory is not None and args.device_memory <= 0:
        raise UsageError(f"--device-memory must be positive, got {args.device_memory:g}.")
    from converters import open_checkpoint, resolve_model
    from jaxserve import demo
    from jaxserve.config import EngineConfig
    from jaxserve.plan import make_plan

    config = EngineConfig(**arguments)
    if config.model is None:
        directory = demo.target_path()
    else:
        directory = resolve_model(
            config.model, config.revision, config.download_dir, config_only=True
        )
    model = open_checkpoint(directory, load_format="dummy").config
    memory = _local_memory() if args.device_memory is None else int(args.device_memory * GIB)
    plan = make_plan(config, model, memory)
    print(json.dumps(_plain(plan), indent=2) if args.json else render(plan))
    return 1 if plan.sequences == 0 else 0


def render(plan: Plan) -> str:
    """The plan as text."""
    devices = f"{plan.devices} devices" if plan.devices > 1 else "1 device"
    length = f"{plan.max_model_len:,} tokens"
    lines = [
        f"{plan.architecture}, {plan.dtype}, on {devices}, max_model_len {plan.max_model_len:,}",
        "",
        f"{'weights':<28}{_gib(plan.weights)}, {_gib(plan.device_weights)} a device "
        f"({_count(plan.parameters)} parameters)",
        f"{'activations (estimate)':<28}{_gib(plan.device_activations)} a device",
        f"{'KV cache of a token':<28}{plan.token / 1024:,.1f} KiB in all layers",
        f"{'KV cache of a sequence':<28}{_gib(plan.device_sequence)} a device, for {length}"
        + (", windows counted" if plan.tables > 1 else ""),
    ]
    if plan.pages is None or plan.device_memory is None or plan.longest is None:
        least = plan.device_weights + plan.device_activations + plan.device_sequence
        lines.append(f"{'needed for one sequence':<28}{_gib(least)} a device")
        return "\n".join([*lines, "", "Give --device-memory to see what fits."])
    lines.append(f"{'memory to use':<28}{_gib(plan.device_memory)} a device")
    if not plan.sequences:
        return "\n".join([*lines, "", _too_large(plan)])
    columns = plan.pages // plan.tables * plan.block_size
    words = f"{plan.pages:,} pages: {columns:,} tokens, {plan.sequences:,} sequences of {length}"
    return "\n".join([*lines, f"{'fits':<28}{words}"])


def _too_large(plan: Plan) -> str:
    assert plan.longest is not None
    if plan.longest:
        return f"A sequence of that length doesn't fit; --max-model-len {plan.longest} does."
    return "It doesn't fit. Give more --tensor-parallel-size or --device-memory."


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.1f} million"


def _plain(plan: Plan) -> dict[str, Any]:
    return dataclasses.asdict(plan) | {
        "device_sequence": plan.device_sequence,
        "sequences": plan.sequences,
    }


def _local_memory() -> int | None:
    """Bytes of the smallest accelerator here; None if there is none that tells."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [one["bytes_limit"] for one in stats if "bytes_limit" in one]
    return min(limits, default=None)
