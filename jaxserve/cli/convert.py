"""``jaxserve convert``: a Hugging Face checkpoint becomes a sharded Orbax one."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from jaxserve.cli.flags import Parser, UsageError
from jaxserve.config import DTYPES, EngineConfig
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from converters import Checkpoint
    from jaxserve.model.params import Params

HELP = "turn a Hugging Face checkpoint into a sharded Orbax checkpoint"
OURS = ("jaxserve_config.json", "params")
"""What makes a directory one that --overwrite may replace."""


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve convert SRC DST [options]",
        description="Loads a Hugging Face checkpoint and saves it as an Orbax one, which "
        'LLM("DST") restores shard by shard. Needs orbax-checkpoint: pip install "jaxserve[orbax]"',
    )
    parser.add_argument("src", metavar="SRC", type=str, help="a model directory or a hub id")
    parser.add_argument("dst", metavar="DST", type=str, help="the directory to make")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        metavar="NAME",
        default="auto",
        help=f"of the saved weights: {', '.join(DTYPES)}; auto keeps the checkpoint's",
    )
    text = "devices that share the model while it is converted; any number can load the result"
    parser.add_argument(
        "--tensor-parallel-size", "-tp", type=int, metavar="N", default=1, help=text
    )
    parser.add_argument("--revision", type=str, metavar="TEXT", help="of the hub repository")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the Orbax checkpoint that DST holds"
    )
    return parser


def run(args: Namespace) -> int:
    """Loads, saves beside DST, and moves the result there when it is complete."""
    target = Path(args.dst).expanduser().absolute()
    _check_target(target, args.overwrite)
    # Only checks the size; the rest of the config isn't needed.
    EngineConfig(tensor_parallel_size=args.tensor_parallel_size)
    start = time.perf_counter()

    from converters import open_checkpoint, orbax, resolve_model

    source = resolve_model(args.src, args.revision)
    if target == source.absolute() or target in source.absolute().parents:
        raise UsageError(f"{target} holds the model to convert; give another DST.")
    checkpoint = open_checkpoint(source)
    params = _load(checkpoint, args.dtype, args.tensor_parallel_size)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        new = Path(folder) / "new"
        orbax.save(new, checkpoint, params)
        _check_target(target, args.overwrite)
        if target.exists():
            shutil.rmtree(target)
        os.replace(new, target)
    size = sum(array.nbytes for array in params.values())
    seconds = time.perf_counter() - start
    dtype = next(iter(params.values())).dtype
    print(f"{target}: {size / 1e9:.3f} GB of {dtype} weights in {seconds:.1f} s")
    return 0


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{target} exists and is not empty; --overwrite replaces it.")
    if not target.is_dir() or not any((target / name).exists() for name in OURS):
        raise UsageError(f"{target} is no Orbax checkpoint of ours; --overwrite won't delete it.")


def _load(checkpoint: Checkpoint, dtype: str, tensor_parallel_size: int) -> Params:
    """The weights, split over the devices, KV heads not repeated."""
    import jax
    import jax.numpy as jnp
    from tqdm.auto import tqdm

    from jaxserve.distributed import LOGICAL_TO_MESH, make_mesh
    from jaxserve.model import decoder
    from jaxserve.model.params import partition_specs

    name = DTYPES[dtype]
    if name == "auto":
        name = checkpoint.config.dtype
    tree = decoder.declare(checkpoint.config)
    try:
        mesh = make_mesh(tensor_parallel_size)
    except RuntimeError as error:  # no device at all
        raise ConfigError(f"JAX can't start: {error}") from error
    specs = partition_specs(tree, LOGICAL_TO_MESH, mesh.shape)
    quiet = not sys.stderr.isatty()
    with tqdm(desc="Loading weights", unit="B", unit_scale=True, disable=quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        params = checkpoint.load(tree, specs, mesh, jnp.dtype(name), progress)
    return jax.block_until_ready(params)
