"""All training text of the demo model, made from a seed, and its held-out counterpart."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from jaxserve.demo import faq, stories, tasks, tools
from jaxserve.demo.chat_format import THINK_NONE, Sample, assistant
from jaxserve.demo.words import Split

Maker = Callable[[Random, Split], Sample]

# One row a kind of document: its maker, and its share of the documents.
_MIX: tuple[tuple[Maker, float], ...] = (
    (faq.faq_sample, 22),
    (faq.fact_sample, 5),
    (faq.introduction_sample, 3),
    (faq.unknown_sample, 2),
    (stories.story_sample, 9),
    (stories.raw_story_sample, 6),
    (tools.tool_sample, 9),
    (tools.new_tool_sample, 15),
    (tools.two_calls_sample, 1),
    (tools.no_tool_sample, 4),
    (tools.tool_result_sample, 4),
    (tasks.json_sample, 8),
    (tasks.copy_sample, 15),
    (tasks.copy_text_sample, 4),
    (tasks.sum_sample, 7),
)
_MAKERS = [maker for maker, _ in _MIX]
_SHARES = [share for _, share in _MIX]

# What `heldout_sample` and evaluation draw from: each has something that training never shows.
EVALUATED: dict[str, Maker] = {
    "faq": faq.faq_sample,
    "fact": faq.fact_sample,
    "story": stories.story_sample,
    "tool": tools.tool_sample,
    "new_tool": tools.new_tool_sample,
    "no_tool": tools.no_tool_sample,
    "tool_result": tools.tool_result_sample,
    "json": tasks.json_sample,
    "copy": tasks.copy_sample,
    "reverse": tasks.copy_sample,
    "sum": tasks.sum_sample,
}

_SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You are the jaxserve demo.",
    "Be brief.",
    "Answer in one sentence.",
    "You are a friendly assistant. Answer the user.",
)
_CHAIN = (
    faq.faq_sample, faq.faq_sample, faq.fact_sample, faq.unknown_sample, tasks.json_sample,
    tasks.copy_sample, tasks.sum_sample, stories.story_sample,
)  # fmt: skip


def _plain_sample(rng: Random, maker: Maker, split: Split) -> Sample:
    """A chat sample of one turn with nothing forced at its opening."""
    while True:
        sample = maker(rng, split)
        if sample.messages and sample.opening in ("", THINK_NONE):
            return replace(sample, opening="")


def conversation(rng: Random, split: Split = "train") -> Sample:
    """Several turns about different things; old thoughts are dropped, as clients do."""
    turns = rng.choice((2, 2, 3, 4, 6, 10))
    history: list[dict[str, object]] = []
    for _ in range(turns - 1):
        past = _plain_sample(rng, rng.choice(_CHAIN), split)
        history += [dict(m) for m in past.messages]
        history.append(dict(assistant(past.answer.split("</think>\n\n")[-1])))
    last = rng.choice(_CHAIN)(rng, split)
    while not last.messages:
        last = rng.choice(_CHAIN)(rng, split)
    return replace(last, task="conversation", messages=(*history, *last.messages))


def train_sample(rng: Random) -> Sample:
    """One document of the training mix."""
    if rng.random() < 0.12:
        sample = conversation(rng)
    else:
        sample = rng.choices(_MAKERS, _SHARES)[0](rng, "train")
    if sample.messages and rng.random() < 0.25:
        system = {"role": "system", "content": rng.choice(_SYSTEM_LINES)}
        sample = replace(sample, messages=(system, *sample.messages))
    return sample


def heldout_sample(rng: Random) -> Sample:
    """One document about words, tools, sums or ways to ask that training never shows."""
    return rng.choice(list(EVALUATED.values()))(rng, "heldout")


def samples(seed: int, count: int, split: Split = "train") -> Iterator[Sample]:
    """`count` documents, the same for the same seed on every machine."""
    rng = Random(seed)
    make = train_sample if split == "train" else heldout_sample
    return (make(rng) for _ in range(count))


def task_samples(task: str, seed: int, count: int, split: Split) -> list[Sample]:
    """`count` test cases of one task of `EVALUATED`, in its plain form."""
    rng = Random(f"{task} {seed}")
    found: list[Sample] = []
    while len(found) < count:
        sample = EVALUATED[task](rng, split)
        if sample.task == task and not sample.opening:
            found.append(sample)
    return found
