"""Greedy answers of a saved demo model, scored task by task on seen and held-out material.

python -m jaxserve.demo.evaluate jaxserve/demo/target --samples 64
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxserve.demo.chat_format import Sample, render_prompt
from jaxserve.demo.checkpoint import load_checkpoint
from jaxserve.demo.corpus import EVALUATED, task_samples
from jaxserve.demo.data import ANSWER_BIT, ID_MASK, encode_chunk, row_starts
from jaxserve.demo.llama import Params, Shape, forward, forward_cached, unembed
from jaxserve.demo.stories import CLOSING, OPENING
from jaxserve.demo.tokenizer import END_OF_TEXT_ID, TURN_END_ID, load_tokenizer
from jaxserve.demo.words import OBJECTS, Split

EVAL_SEED = 20_000_003
_PROMPT_BUCKETS = (128, 512)
_ANSWER_BUCKETS = (96, 256)
_LONG_TASKS = ("story", "sum", "copy")
_BATCH = 64
_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


@partial(jax.jit, static_argnames=("shape", "new_tokens"))
def _greedy(
    params: Params, prompts: jax.Array, lengths: jax.Array, shape: Shape, new_tokens: int
) -> jax.Array:
    """Greedy continuations [B, new_tokens] of right-padded prompts [B, P] of `lengths` [B].

    After a row's end its tokens are END_OF_TEXT_ID.
    """
    batch, width = prompts.shape
    rows = jnp.arange(batch)
    slots = width + new_tokens
    cache = jnp.zeros((shape.layers, 2, batch, slots, shape.kv_heads, shape.head_size))
    hidden, cache = forward_cached(params, prompts, jnp.zeros_like(lengths), cache, shape)
    first = jnp.argmax(unembed(params, hidden[rows, lengths - 1]), -1).astype(jnp.int32)

    def unfinished(carry: tuple) -> jax.Array:
        step, _, done, _, _ = carry
        return (step < new_tokens) & ~done.all()

    def advance(carry: tuple) -> tuple:
        step, token, done, out, cache = carry
        token = jnp.where(done, END_OF_TEXT_ID, token)
        out = out.at[:, step].set(token)
        done |= (token == TURN_END_ID) | (token == END_OF_TEXT_ID)
        hidden, cache = forward_cached(params, token[:, None], lengths + step, cache, shape)
        token = jnp.argmax(unembed(params, hidden[:, 0]), -1).astype(jnp.int32)
        return step + 1, token, done, out, cache

    out = jnp.full((batch, new_tokens), END_OF_TEXT_ID, jnp.int32)
    done = jnp.zeros(batch, bool)
    return jax.lax.while_loop(unfinished, advance, (0, first, done, out, cache))[3]


def generate(
    params: Params, shape: Shape, tokenizer: Tokenizer, prompts: Sequence[str], new_tokens: int
) -> list[str]:
    """Greedy answers, cut at the first end token. Text that never ended gets a trailing "…"."""
    answers = []
    batch = min(_BATCH, len(prompts))
    for start in range(0, len(prompts), batch):
        part = [tokenizer.encode(prompt).ids for prompt in prompts[start : start + batch]]
        count = len(part)
        part += [[END_OF_TEXT_ID]] * (batch - count)
        longest = max(map(len, part))
        width = next(size for size in (*_PROMPT_BUCKETS, shape.context) if size >= longest)
        padded = np.full((batch, width), END_OF_TEXT_ID, np.int32)
        for row, ids in enumerate(part):
            padded[row, : len(ids)] = ids
        lengths = np.array([len(ids) for ids in part], np.int32)
        out = np.asarray(_greedy(params, padded, lengths, shape, new_tokens))
        for ids in out[:count]:
            ends = np.flatnonzero((ids == TURN_END_ID) | (ids == END_OF_TEXT_ID))
            kept = ids[: ends[0]] if len(ends) else ids
            text = tokenizer.decode(kept.tolist(), skip_special_tokens=False)
            answers.append(text if len(ends) else text + "…")
    return answers


def parse_calls(text: str) -> list[dict[str, object]] | None:
    """The tool calls in a text; None if there are none or one is no valid JSON call."""
    try:
        calls = [json.loads(body) for body in _CALL.findall(text)]
    except ValueError:
        return None
    valid = all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls)
    return calls if calls and valid else None


def _score_exact(sample: Sample, answer: str) -> dict[str, bool]:
    return {"exact": answer == sample.answer}


def _score_call(sample: Sample, answer: str) -> dict[str, bool]:
    calls, wanted = parse_calls(answer), parse_calls(sample.answer)
    name = bool(calls and wanted and calls[0]["name"] == wanted[0]["name"])
    return {"exact": calls == wanted, "valid_json": calls is not None, "right_name": name}


def _score_json(sample: Sample, answer: str) -> dict[str, bool]:
    try:
        value = json.loads(answer)
    except ValueError:
        return {"exact": False, "valid_json": False}
    return {"exact": value == json.loads(sample.answer), "valid_json": True}


def _score_sum(sample: Sample, answer: str) -> dict[str, bool]:
    result = sample.answer.split("</think>\n\n")[-1]
    return {"exact": answer == sample.answer, "right_sum": answer.endswith(result)}


def _score_story(sample: Sample, answer: str) -> dict[str, bool]:
    """Exact here means: whole, and the closing sentence names hero, animal and object rightly."""
    facts = sample.facts
    formed = answer.startswith(OPENING) and answer.endswith(CLOSING)
    last = answer.rsplit(" And ", 1)[-1]
    right = all(word in last for word in (facts["name"], facts["animal"], facts["noun"]))
    strange = (set(OBJECTS.train + OBJECTS.heldout) - {facts["noun"]}) & set(
        re.findall(r"\w+", answer)
    )
    one = right and not strange
    return {"exact": formed and one, "well_formed": formed, "right_reference": one}


_SCORERS: dict[str, Callable[[Sample, str], dict[str, bool]]] = {
    "tool": _score_call,
    "new_tool": _score_call,
    "json": _score_json,
    "sum": _score_sum,
    "story": _score_story,
}


def evaluate(folder: Path, count: int = 64, show: int = 0) -> dict[str, dict[str, dict]]:
    """Rates by split and task: {"heldout": {"tool": {"exact": 0.9, ...}}}."""
    params, shape = load_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    splits: tuple[Split, ...] = ("train", "heldout")
    report: dict[str, dict[str, dict]] = {split: {} for split in splits}
    for task in EVALUATED:
        new_tokens = _ANSWER_BUCKETS[task in _LONG_TASKS]
        cases = {split: task_samples(task, EVAL_SEED, count, split) for split in splits}
        prompts = [render_prompt(sample) for split in splits for sample in cases[split]]
        answers = iter(generate(params, shape, tokenizer, prompts, new_tokens))
        score = _SCORERS.get(task, _score_exact)
        for split in splits:
            pairs = [(sample, next(answers)) for sample in cases[split]]
            rows = [score(sample, answer) for sample, answer in pairs]
            rates = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}
            report[split][task] = {"samples": count, **rates}
            wrong = [pair for pair, row in zip(pairs, rows, strict=True) if not row["exact"]]
            for sample, answer in wrong[:show]:
                print(f"[{split} {task}] wanted {sample.answer!r}\n    got {answer!r}", flush=True)
    return report


def agreement(folder: Path, target: Path, documents: int = 400, length: int = 512) -> float:
    """Share of held-out answer tokens for which both models' best token is the same.

    It bounds what greedy speculation can accept: text [rows, length] is given, not generated.
    """
    tokenizer_json = load_tokenizer(folder).to_str()
    stream = encode_chunk(EVAL_SEED, tokenizer_json, "heldout", documents)
    places = row_starts(stream, length)[:, None] + np.arange(length + 1)
    words = stream[places]
    tokens, is_answer = words[:, :-1] & ID_MASK, (words[:, 1:] & ANSWER_BIT) > 0
    best = []
    for path in (folder, target):
        params, shape = load_checkpoint(path)
        run = jax.jit(partial(forward, shape=shape))
        rows = [run(params, row[None].astype(np.int32))[0].argmax(-1) for row in tokens]
        best.append(np.stack([np.asarray(row) for row in rows]))
    return round(float((best[0] == best[1])[is_answer].mean()), 4)


def table(report: dict[str, dict[str, dict]]) -> str:
    """The report as lines for people."""
    lines = [f"{'split':8} {'task':12} {'exact':>6}  other rates"]
    for split, tasks in report.items():
        for task, rates in tasks.items():
            rest = {key: rate for key, rate in rates.items() if key not in ("exact", "samples")}
            others = ", ".join(f"{key} {rate:.0%}" for key, rate in rest.items())
            lines.append(f"{split:8} {task:12} {rates['exact']:6.0%}  {others}".rstrip())
    return "\n".join(lines)


def evaluate_and_save(folder: Path, count: int, target: Path | None = None, show: int = 0) -> None:
    """Evaluate, print the table, write `eval.json` beside the weights."""
    report: dict[str, object] = dict(evaluate(folder, count, show))
    print(table(report), flush=True)  # type: ignore[arg-type]
    if target is not None:
        report["agreement_with_target"] = agreement(folder, target)
        print(f"same best token as the target: {report['agreement_with_target']:.1%}", flush=True)
    (folder / "eval.json").write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", type=Path, help="compare with this model, token by token")
    parser.add_argument("--samples", type=int, default=64, help="test cases a task and split")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers a task")
    args = parser.parse_args()
    evaluate_and_save(args.folder, args.samples, args.target, args.show)


if __name__ == "__main__":
    main()
