"""Runs work on an engine and takes the time. The keys of the results are vLLM's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from jaxserve.bench.workload import Item
from jaxserve.llm import LLM
from jaxserve.sampling.params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def seconds(
    llm: LLM,
    items: Sequence[Item],
    temperature: float = 0.0,
    detokenize: bool = False,
    use_tqdm: bool = False,
) -> float:
    """Seconds from the first prompt to the last token of one ``generate`` call.

    Raises:
        InvalidRequestError: a prompt can't be served.
        RuntimeError: the engine gave another number of tokens than was asked for.
    """
    prompts = [{"prompt_token_ids": item.prompt} for item in items]
    params = [
        SamplingParams(
            temperature=temperature,
            max_tokens=item.output_len,
            ignore_eos=True,
            detokenize=detokenize,
        )
        for item in items
    ]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=use_tqdm)
    elapsed = time.perf_counter() - start
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    if made != sum(item.output_len for item in items):
        raise RuntimeError(f"{made} tokens came, {sum(i.output_len for i in items)} were asked for")
    return elapsed


def latency(
    llm: LLM, items: Sequence[Item], num_warmup: int, num_iters: int, **options: Any
) -> dict[str, Any]:
    """The time of one batch, again and again.

    Args:
        items: the batch.
        num_warmup: rounds before those that count.
        num_iters: rounds that count.
        **options: see ``seconds``; ``use_tqdm`` shows the rounds.

    Returns:
        avg_latency and latencies in seconds, and percentiles: {"10": seconds, ...}.
    """
    quiet = not options.pop("use_tqdm", False)
    for _ in tqdm(range(num_warmup), desc="Warming up", disable=quiet, leave=False):
        seconds(llm, items, **options)
    rounds = tqdm(range(num_iters), desc="Measuring", disable=quiet, leave=False)
    latencies = [seconds(llm, items, **options) for _ in rounds]
    values = np.percentile(latencies, PERCENTILES)
    return {
        "avg_latency": statistics.fmean(latencies),
        "latencies": latencies,
        "percentiles": {str(p): float(value) for p, value in zip(PERCENTILES, values)},
    }


def throughput(llm: LLM, items: Sequence[Item], **options: Any) -> dict[str, Any]:
    """The time of many requests given at once.

    Returns:
        elapsed_time in seconds, num_requests, total_num_tokens (prompts and outputs),
        requests_per_second and tokens_per_second as vLLM's benchmark writes them, and
        num_prompt_tokens, num_output_tokens and output_tokens_per_second beside them.
    """
    elapsed = seconds(llm, items, **options)
    prompt = sum(len(item.prompt) for item in items)
    output = sum(item.output_len for item in items)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(items),
        "total_num_tokens": prompt + output,
        "requests_per_second": len(items) / elapsed,
        "tokens_per_second": (prompt + output) / elapsed,
        "num_prompt_tokens": prompt,
        "num_output_tokens": output,
        "output_tokens_per_second": output / elapsed,
    }
