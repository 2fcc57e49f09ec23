"""``jaxserve bench throughput``: many requests given at once."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from jaxserve.cli import bench_engine
from jaxserve.cli.flags import Parser, UsageError

if TYPE_CHECKING:
    from jaxserve.bench.workload import Item
    from jaxserve.llm import LLM

HELP = "requests and tokens per second of many requests given at once"
INPUT_LEN, OUTPUT_LEN = 1024, 128


def make_parser() -> Parser:
    """The flags of the subcommand."""
    parser = Parser(
        usage="jaxserve bench throughput [options]",
        description="Gives many requests to the engine at once, as vllm bench throughput does.",
    )
    add = parser.add_argument
    add("--num-prompts", type=int, default=1000, metavar="N", help="requests")
    add(
        "--dataset-name",
        choices=("random", "sharegpt"),
        default="random",
        metavar="NAME",
        help="random token ids, or sharegpt: conversations of --dataset-path",
    )
    add("--dataset-path", type=str, metavar="FILE", help="JSON in ShareGPT's format")
    text = "tokens of a random prompt; the same as --random-input-len"
    add("--input-len", type=int, metavar="N", help=text)
    text = "tokens to generate for each request, also instead of ShareGPT's answers"
    add("--output-len", type=int, metavar="N", help=text)
    text = f"tokens of a random prompt [default: {INPUT_LEN}, or what fits]"
    add("--random-input-len", type=int, metavar="N", help=text)
    text = f"tokens to generate for it [default: {OUTPUT_LEN}, or what fits]"
    add("--random-output-len", type=int, metavar="N", help=text)
    text = "draw lengths evenly from len * (1 - ratio) to len * (1 + ratio)"
    add("--random-range-ratio", type=float, default=0.0, metavar="X", help=text)
    add("--temperature", type=float, default=1.0, metavar="X", help="of sampling; 0 is greedy")
    add("--disable-detokenize", action="store_true", help="make no text of the tokens")
    bench_engine.add_flags(parser)
    return parser


def run(args: Namespace) -> int:
    """Measures and prints."""
    lengths = ("input_len", "output_len", "random_input_len", "random_output_len")
    bench_engine.check_positive(args, "num_prompts", *lengths)
    if (args.dataset_name == "sharegpt") != (args.dataset_path is not None):
        raise UsageError("--dataset-name sharegpt and --dataset-path FILE go together.")
    if not 0 <= args.random_range_ratio < 1:
        raise UsageError("--random-range-ratio must be at least 0 and below 1.")
    if args.dataset_path is not None and (args.skip_tokenizer_init or args.model_shape):
        raise UsageError("--dataset-name sharegpt needs a tokenizer.")
    with bench_engine.engine(args) as llm:
        from jaxserve.bench import measure

        results = measure.throughput(
            llm,
            _items(args, llm),
            temperature=args.temperature,
            detokenize=not args.disable_detokenize,
            use_tqdm=bench_engine.show_progress(),
        )
    bench_engine.write_json(args.output_json, results)
    print(_text(results))
    return 0


def _items(args: Namespace, llm: LLM) -> list[Item]:
    from jaxserve.bench.workload import random_items, random_lengths, sharegpt_items

    rng = random.Random(args.seed)
    if args.dataset_name == "sharegpt":
        encode = llm.get_tokenizer().encode
        return sharegpt_items(args.dataset_path, args.num_prompts, encode, rng, args.output_len)
    input_len, output_len = bench_engine.lengths_that_fit(
        llm,
        args.input_len or args.random_input_len,
        args.output_len or args.random_output_len,
        (INPUT_LEN, OUTPUT_LEN),
    )
    ratio = args.random_range_ratio
    lengths = random_lengths(args.num_prompts, input_len, output_len, ratio, rng)
    return random_items(lengths, llm.model_config.vocab_size, rng)


def _text(results: dict[str, Any]) -> str:
    from jaxserve.bench.results import table

    seconds = results["elapsed_time"]
    counts = {
        "requests": results["num_requests"],
        "prompt tokens": results["num_prompt_tokens"],
        "output tokens": results["num_output_tokens"],
        "all tokens": results["total_num_tokens"],
    }
    rows = [[name, f"{count:,}", f"{count / seconds:,.2f}"] for name, count in counts.items()]
    return f"{seconds:.2f} s\n{table([['', 'number', 'per second'], *rows])}"
