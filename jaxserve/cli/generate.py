"""``jaxserve generate``: completes one prompt."""

from __future__ import annotations

import sys

from jsonargparse import Namespace

from jaxserve.cli import STARTED, flags
from jaxserve.cli.flags import Parser, UsageError

HELP = "complete a prompt and print the text as it comes"
MAX_TOKENS = 256
GIB = 2**30


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve generate [PROMPT] [MODEL] [options]",
        description="Completes a prompt. The text goes to standard output, figures to standard "
        'error. Example: jaxserve generate "Once upon a time" --temperature 0',
    )
    text = "the text to go on with; - or none reads standard input"
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", type=str, help=text)
    flags.add_model(parser)
    flags.add_sampling_flags(parser, MAX_TOKENS)
    flags.add_engine_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Generates and reports."""
    engine, sampling = flags.engine_arguments(args), flags.sampling_arguments(args)
    prompt = read_prompt(args.prompt)

    from jaxserve.cli.streaming import stream
    from jaxserve.llm import LLM

    with LLM(**engine, warmup="background", use_tqdm=sys.stderr.isatty()) as llm:
        params = llm.get_default_sampling_params().replace(**sampling)
        answer = stream(llm, prompt, params)
        print(flush=True)
        print(answer.summary(), file=sys.stderr)
        if answer.token_times:
            first = answer.token_times[0]
            print(
                f"first token {first - STARTED:.1f} s after the command started, "
                f"{first - answer.started:.2f} s after the model was ready",
                file=sys.stderr,
            )
        print(f"peak memory: {_peak_memory()}", file=sys.stderr)
    return 130 if answer.stopped else 0


def read_prompt(word: str | None) -> str:
    """The prompt of a command line, or standard input for "-" and for none."""
    if word is not None and word != "-":
        return word
    if word is None and sys.stdin.isatty():
        raise UsageError("give a prompt, or pipe one in.")
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise UsageError("the prompt from standard input is empty.")
    return text


def _peak_memory() -> str:
    """The most that this process had at once, on the host and on each device."""
    import resource

    import jax

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    words = [f"host {host / GIB:.2f} GiB"]
    for device in jax.local_devices():
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if peak:
            words.append(f"{device.platform} {device.id} {peak / GIB:.2f} GiB")
    return ", ".join(words)
