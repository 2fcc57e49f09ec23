"""What the benchmarks that run an engine have in common: its flags, and the engine."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from jaxserve.bench.shapes import SHAPES, write_shape
from jaxserve.cli import flags
from jaxserve.cli.flags import Parser, UsageError

if TYPE_CHECKING:
    from jaxserve.bench.floors import Costs, Hardware
    from jaxserve.llm import LLM

SHOWN = ("skip_tokenizer_init", "seed")
"""Fields of EngineConfig that other commands hide."""


def add_flags(parser: Parser) -> None:
    """The model's and the engine's flags; without prefix caching, which repeated rounds would
    turn into a benchmark of the cache."""
    flags.add_model(parser, positional=False)
    text = f"random weights in the shape of a model, instead of a model: {', '.join(SHAPES)}"
    parser.add_argument("--model-shape", choices=tuple(SHAPES), metavar="NAME", help=text)
    parser.add_argument("--output-json", type=str, metavar="FILE", help="write the results there")
    flags.add_engine_flags(parser, also=SHOWN)
    parser.set_defaults(enable_prefix_caching=False)


def add_hardware_flags(parser: Parser) -> None:
    """What the floor is computed from."""
    group = parser.add_argument_group(
        "floor", "With both, results stand beside the least that the hardware allows."
    )
    text = "of one device's memory, in TB/s"
    group.add_argument("--bandwidth", type=float, metavar="X", help=text)
    text = "of one device's matrix products in the model's dtype, in TFLOP/s"
    group.add_argument("--flops", type=float, metavar="X", help=text)


@contextlib.contextmanager
def engine_arguments(args: Namespace) -> Iterator[dict[str, Any]]:
    """The keyword arguments of LLM; a shape's directory lasts as long as the context."""
    arguments = flags.engine_arguments(args, also=SHOWN)
    if args.model_shape is None:
        yield arguments
        return
    if arguments["model"] is not None:
        raise UsageError("give either --model or --model-shape.")
    with tempfile.TemporaryDirectory(prefix="jaxserve-") as folder:
        write_shape(args.model_shape, Path(folder))
        made = {"model": folder, "load_format": "dummy", "skip_tokenizer_init": True}
        yield arguments | made


@contextlib.contextmanager
def engine(args: Namespace) -> Iterator[LLM]:
    """The engine that the flags describe."""
    with engine_arguments(args) as arguments:
        from jaxserve.llm import LLM

        with LLM(**arguments, use_tqdm=show_progress()) as llm:
            yield llm


def cost_and_hardware(args: Namespace, llm: LLM) -> tuple[Costs, Hardware | None]:
    """What the model's tokens cost, and all devices together; None unless both flags are given."""
    from jaxserve.bench.floors import Hardware, costs

    cost = costs(llm.model_config, llm.dtype)
    if args.bandwidth is None or args.flops is None:
        return cost, None
    devices = llm.config.tensor_parallel_size * 1e12
    return cost, Hardware(args.bandwidth * devices, args.flops * devices)


def check_hardware_flags(args: Namespace) -> None:
    """Refuses one flag without the other, and what isn't positive."""
    if (args.bandwidth is None) != (args.flops is None):
        raise UsageError("a floor needs both --bandwidth and --flops.")
    if args.bandwidth is not None and not (args.bandwidth > 0 and args.flops > 0):
        raise UsageError("--bandwidth and --flops must be positive.")


def check_positive(args: Namespace, *names: str) -> None:
    """Refuses counts and lengths below 1."""
    for name in names:
        if args[name] is not None and args[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {args[name]}.")


def lengths_that_fit(
    llm: LLM, input_len: int | None, output_len: int | None, defaults: tuple[int, int]
) -> tuple[int, int]:
    """The wanted (input, output) lengths; defaults become shorter for models of short contexts."""
    room = llm.config.max_model_len
    outputs = output_len or max(1, min(defaults[1], room // 4))
    return input_len or max(1, min(defaults[0], room - outputs)), outputs


def write_json(path: str | None, results: Any) -> None:
    """Writes results as JSON, if there is a path."""
    if path is not None:
        Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def device() -> str:
    """What the engine runs on, for titles."""
    import jax

    return jax.local_devices()[0].device_kind


def show_progress() -> bool:
    """Whether somebody looks at standard error."""
    return sys.stderr.isatty()
