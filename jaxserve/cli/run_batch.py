"""``jaxserve run-batch``: a file of requests in OpenAI's batch format."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jsonargparse import Namespace

from jaxserve.cli import flags, serve_flags
from jaxserve.cli.bench_engine import show_progress
from jaxserve.cli.flags import Parser, UsageError, server_extra

HELP = "answer a file of requests in OpenAI's batch format"
SHOWN = {
    *("served_model_name", "chat_template", "response_role", "trust_request_chat_template"),
    *("max_logprobs", "max_prompts", "max_n", "max_messages", "max_body_bytes"),
    *("step_timeout_s", "log_level"),
}
"""Fields of ServerConfig that matter without HTTP."""
MANY, YEAR_S = 10**6, 365 * 86400.0


def make_parser() -> Parser:
    """The flags of the subcommand."""
    from server.config import ServerConfig

    parser = Parser(
        usage="jaxserve run-batch -i IN.jsonl -o OUT.jsonl [MODEL] [options]",
        description='Answers requests from a file. A line is {"custom_id": "a", "method": "POST", '
        '"url": "/v1/chat/completions", "body": {...}}; /v1/completions and /v1/embeddings are '
        "known, too. Answers are written as they come; custom_id tells them apart.",
    )
    add = parser.add_argument
    add("-i", "--input-file", type=str, required=True, metavar="FILE", help="requests")
    add("-o", "--output-file", type=str, required=True, metavar="FILE", help="answers")
    flags.add_model(parser)
    hidden = [f.name for f in dataclasses.fields(ServerConfig) if f.name not in SHOWN]
    group = parser.add_argument_group("requests and replies")
    flags.add_fields(group, ServerConfig, hidden, True, serve_flags.NAMES)
    flags.add_engine_flags(parser, also=serve_flags.ALSO)
    serve_flags.add_foreign_flags(parser)
    return parser


def arrange(words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command's words with those that the environment and ``--config`` add."""
    return serve_flags.arrange(make_parser(), words, environ)


def run(args: Namespace) -> int:
    """Answers all requests; 1 if one of them failed."""
    engine, config = serve_flags.configs(args)
    # Nobody waits for a single answer, so no request may be turned away for having to wait.
    config = dataclasses.replace(config, max_queue=MANY, queue_timeout_s=YEAR_S)
    source, target = Path(args.input_file), Path(args.output_file)
    try:
        lines = source.read_bytes().splitlines()
        out = target.open("wb")
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    with out:
        from tqdm.auto import tqdm

        from jaxserve import log

        with server_extra():
            from server.batch import run_batch

        log.set_up()
        total = sum(bool(line.strip()) for line in lines)
        with tqdm(total=total, unit="req", disable=not show_progress()) as bar:
            counts = run_batch(engine, config, lines, out.write, bar.update)
    print(
        f"{counts.completed} requests answered, {counts.failed} failed: {target}", file=sys.stderr
    )
    return 1 if counts.failed else 0
