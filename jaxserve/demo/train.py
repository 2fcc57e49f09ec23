"""Train the demo models from nothing but this package.

    python -m jaxserve.demo.train --minutes 6                 # both, into the package itself
    python -m jaxserve.demo.train --out DIR --model target --steps 2000

Writes DIR/target and DIR/draft: Hugging Face directories with `eval.json` (how good it is) and
`training.json` (how it was made) beside the weights. The same seed and `--steps` give the same
run on the same kind of device; with `--minutes` the number of steps follows the step time.
"""

import argparse
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxserve.demo import draft_path
from jaxserve.demo.checkpoint import load_checkpoint, save_checkpoint
from jaxserve.demo.data import build_stream, row_starts, training_texts
from jaxserve.demo.evaluate import evaluate_and_save
from jaxserve.demo.learning import (
    Loss,
    Run,
    State,
    attention_implementation,
    batches,
    distillation_loss,
    learning_rates,
    make_run,
    optimiser,
    text_loss,
)
from jaxserve.demo.llama import DRAFT, TARGET, Params, Shape, init_params
from jaxserve.demo.tokenizer import load_tokenizer, train_tokenizer

SHORT_ROW, LONG_ROW = 512, 2048
LONG_SHARE = 0.2
"""Share of the training time, at its end, on rows as long as the context."""
TARGET_SHARE = 0.75
"""The target's share of `--minutes` when both models are trained."""
TOKENIZER_DOCUMENTS = 20_000
PEAK_RATES = {"target": 2e-3, "draft": 3e-3}


@dataclass(frozen=True)
class Phase:
    """Rows of one length: where they start, how many a batch, and the compiled steps."""

    length: int
    batch: int
    starts: np.ndarray
    run: Run


@dataclass
class Trainer:
    """Everything a training run needs besides its number of steps."""

    name: str
    loss: Loss
    state: State
    teacher: Params | None
    stream: jax.Array
    phases: tuple[Phase, Phase]
    steps_a_call: int
    seed: int

    def measure(self, phase: Phase) -> float:
        """Compile a phase; seconds a step afterwards. The state is copied, not changed."""
        chunk = next(batches(phase.starts, self.steps_a_call, phase.batch, self.seed))
        rates = np.zeros(self.steps_a_call, np.float32)
        begin = time.monotonic()
        for turn in range(2):
            state = jax.tree.map(jnp.copy, self.state)
            jax.block_until_ready(state)
            begin = time.monotonic() if turn else begin
            jax.block_until_ready(phase.run(state, self.teacher, self.stream, chunk, rates))
            seconds = time.monotonic() - begin
            print(f"{self.name}: {phase.length}-token rows, call {turn}: {seconds:.2f} s",
                  flush=True)  # fmt: skip
        return seconds / self.steps_a_call

    def plan(self, steps: int, seconds: float) -> tuple[int, int]:
        """Calls on short rows and on long rows, from a number of steps or the seconds left."""
        if steps:
            calls = max(2, round(steps / self.steps_a_call))
            long_calls = max(1, round(calls * LONG_SHARE))
            return calls - long_calls, long_calls
        deadline = time.monotonic() + seconds
        short_step, long_step = (self.measure(phase) for phase in self.phases)
        left = max(0.0, deadline - time.monotonic()) / self.steps_a_call
        short_calls = int(left * (1 - LONG_SHARE) / short_step)
        return max(1, short_calls), max(1, int(left * LONG_SHARE / long_step))

    def train(self, calls: tuple[int, int]) -> float:
        """Run the plan, print the loss now and then; the mean loss of the last call."""
        total = sum(calls) * self.steps_a_call
        rates = learning_rates(total, PEAK_RATES[self.name])
        step, tokens, begin, said = 0, 0, time.monotonic(), 0.0
        mean = float("nan")
        for phase, count in zip(self.phases, calls, strict=True):
            feed = batches(phase.starts, self.steps_a_call, phase.batch, self.seed)
            for _ in range(count):
                part = rates[step : step + self.steps_a_call]
                self.state, losses = phase.run(
                    self.state, self.teacher, self.stream, next(feed), part
                )
                mean = float(losses.mean())
                step += self.steps_a_call
                tokens += self.steps_a_call * phase.batch * phase.length
                seconds = time.monotonic() - begin
                if seconds - said > 5 or step == total:
                    said = seconds
                    print(
                        f"{self.name}: step {step}/{total}, rows {phase.length}, loss {mean:.4f}, "
                        f"rate {part[-1]:.1e}, {tokens / seconds:,.0f} tokens/s, {seconds:.0f} s",
                        flush=True,
                    )
        return mean


def make_trainer(
    name: str, shape: Shape, stream: np.ndarray, args: argparse.Namespace, teacher_folder: Path
) -> Trainer:
    """Place the data and a fresh model on the device."""
    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.dtype(jnp.bfloat16 if on_gpu else jnp.float32)
    attention = attention_implementation()
    print(f"{name}: {jax.devices()[0]}, {dtype}, attention {attention or 'xla'}", flush=True)
    teacher = None
    loss = text_loss(shape, dtype, attention)
    if name == "draft":
        teacher, teacher_shape = load_checkpoint(teacher_folder)
        loss = distillation_loss(shape, teacher_shape, dtype, attention)
    batch = args.batch or (64 if on_gpu else 8)
    params = init_params(shape, args.seed)
    long_batch = max(1, batch * SHORT_ROW // LONG_ROW)
    phases = tuple(
        Phase(length, rows, row_starts(stream, length), make_run(loss, length))
        for length, rows in ((SHORT_ROW, batch), (LONG_ROW, long_batch))
    )
    return Trainer(
        name=name,
        loss=loss,
        state=(params, optimiser().init(params)),
        teacher=teacher,
        stream=jnp.asarray(stream),
        phases=(phases[0], phases[1]),
        steps_a_call=25 if on_gpu else 2,
        seed=args.seed,
    )


def train_model(
    name: str, stream: np.ndarray, tokenizer: Tokenizer, args: argparse.Namespace, minutes: float
) -> None:
    """Train, save and evaluate one of the two models."""
    shape = TARGET if name == "target" else DRAFT
    folder = args.out / name
    trainer = make_trainer(name, shape, stream, args, args.out / "target")
    calls = trainer.plan(args.steps, minutes * 60)
    loss = trainer.train(calls)
    save_checkpoint(folder, trainer.state[0], shape, tokenizer)
    weights = (folder / "model.safetensors").read_bytes()
    record = {
        "seed": args.seed,
        "parameters": sum(p.size for p in trainer.state[0].values()),
        "steps": [count * trainer.steps_a_call for count in calls],
        "rows": [[phase.batch, phase.length] for phase in trainer.phases],
        "corpus_tokens": len(stream),
        "last_loss": round(loss, 4),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{name}: {record['parameters']:,} parameters, loss {loss:.4f} -> {folder}", flush=True)
    if args.eval_samples:
        target = args.out / "target" if name == "draft" else None
        evaluate_and_save(folder, args.eval_samples, target, args.show)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=draft_path().parent, help="parent folder")
    parser.add_argument("--model", choices=("all", "target", "draft"), default="all")
    parser.add_argument("--minutes", type=float, default=6.5, help="training time, compiling too")
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps, instead of minutes")
    parser.add_argument("--batch", type=int, default=0, help="rows of 512 tokens; 0: by device")
    parser.add_argument("--tokens", type=int, default=300_000_000, help="size of the corpus")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-samples", type=int, default=64, help="a task; 0: no evaluation")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers a task")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    begin = time.monotonic()
    if args.model == "draft":
        tokenizer = load_tokenizer(args.out / "target")
    else:
        tokenizer = train_tokenizer(training_texts(args.seed, TOKENIZER_DOCUMENTS))
    stream = build_stream(tokenizer, args.seed, args.tokens, args.workers)
    print(f"{len(stream):,} tokens in {time.monotonic() - begin:.1f} s", flush=True)
    names = ("target", "draft") if args.model == "all" else (args.model,)
    for name in names:
        share = 1.0
        if args.model == "all":
            share = TARGET_SHARE if name == "target" else 1 - TARGET_SHARE
        train_model(name, stream, tokenizer, args, args.minutes * share)


if __name__ == "__main__":
    main()
