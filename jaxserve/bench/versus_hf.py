"""Offline generation beside transformers' ``generate`` on the same cores and the same model.

    python -m jaxserve.bench.versus_hf [--model DIR] [--prompts 32] [--tokens 64]

Needs torch (the ``test`` extra). Prints the best of ``--rounds`` rounds of each, interleaved, so
that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from jaxserve import LLM, SamplingParams, demo

QUESTION = "Once upon a time"


def main() -> None:
    """Runs both and prints tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo.target_path()))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    names = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo")
    prompts = [f"{QUESTION}, {names[i % 8]} {'walked ' * (i % 5)}" for i in range(options.prompts)]
    total = options.prompts * options.tokens
    contenders = {
        "jaxserve": _jaxserve(options.model, prompts, options.tokens),
        "transformers, one batch": _transformers(options.model, prompts, options.tokens, True),
        "transformers, one by one": _transformers(options.model, prompts, options.tokens, False),
    }
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(options.rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            assert run() == total, name
            best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        ratio = seconds / best["jaxserve"]
        print(f"{name:26} {seconds:7.3f} s  {total / seconds:8.0f} tok/s  {ratio:5.2f} x our time")


def _jaxserve(model: str, prompts: list[str], tokens: int) -> Callable[[], int]:
    llm = LLM(model, use_tqdm=False, enable_prefix_caching=False, max_num_seqs=len(prompts))
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def run() -> int:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    run()
    return run


def _transformers(model: str, prompts: list[str], tokens: int, batch: bool) -> Callable[[], int]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
    hf = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(texts: list[str]) -> int:
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            out = hf.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id or 0)
        new = out[:, inputs["input_ids"].shape[1] :]
        tokenizer.batch_decode(new, skip_special_tokens=True)
        return new.numel()

    def run() -> int:
        return generate(prompts) if batch else sum(generate([prompt]) for prompt in prompts)

    generate(prompts[:1])
    return run


if __name__ == "__main__":
    main()
