"""``jaxserve bench latency``: the time of one batch."""

from __future__ import annotations

import random
from typing import Any

from jsonargparse import Namespace

from jaxserve.cli import bench_engine
from jaxserve.cli.flags import Parser, UsageError

HELP = "the time of one batch, again and again"
INPUT_LEN, OUTPUT_LEN = 32, 128


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve bench latency [options]",
        description="Gives one batch of random prompts to the engine, again and again, as "
        "vllm bench latency does.",
    )
    add = parser.add_argument
    text = f"tokens of a prompt [default: {INPUT_LEN}, or what fits]"
    add("--input-len", type=int, metavar="N", help=text)
    text = f"tokens to generate for each [default: {OUTPUT_LEN}, or what fits]"
    add("--output-len", type=int, metavar="N", help=text)
    add("--batch-size", type=int, default=8, metavar="N", help="prompts of a batch")
    add("--num-iters-warmup", type=int, default=10, metavar="N", help="rounds that don't count")
    add("--num-iters", type=int, default=30, metavar="N", help="rounds that count")
    add("--temperature", type=float, default=1.0, metavar="X", help="of sampling; 0 is greedy")
    add("--disable-detokenize", action="store_true", help="make no text of the tokens")
    bench_engine.add_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Measures and prints."""
    bench_engine.check_positive(args, "input_len", "output_len", "batch_size", "num_iters")
    if args.num_iters_warmup < 0:
        raise UsageError("--num-iters-warmup must not be negative.")
    with bench_engine.engine(args) as llm:
        from jaxserve.bench import measure
        from jaxserve.bench.workload import random_items

        wanted = (args.input_len, args.output_len)
        lengths = bench_engine.lengths_that_fit(llm, *wanted, (INPUT_LEN, OUTPUT_LEN))
        rng, vocab_size = random.Random(args.seed), llm.model_config.vocab_size
        results = measure.latency(
            llm,
            random_items([lengths] * args.batch_size, vocab_size, rng),
            args.num_iters_warmup,
            args.num_iters,
            temperature=args.temperature,
            detokenize=not args.disable_detokenize,
            use_tqdm=bench_engine.show_progress(),
        )
    bench_engine.write_json(args.output_json, results)
    print(_text(results, args.batch_size, *lengths))
    return 0


def _text(results: dict[str, Any], batch_size: int, input_len: int, output_len: int) -> str:
    from jaxserve.bench.results import table

    average = results["avg_latency"]
    rows = [["latency", "s", "ms/token", "out tok/s"]]
    values = {"average": average}
    values |= {f"{name}th percentile": value for name, value in results["percentiles"].items()}
    for name, value in values.items():
        rate = batch_size * output_len / value
        rows.append([name, f"{value:.4f}", f"{value / output_len * 1e3:.3f}", f"{rate:,.1f}"])
    head = f"{batch_size} x {input_len} tokens in, {output_len} out, "
    return f"{head}{len(results['latencies'])} rounds\n{table(rows)}"
